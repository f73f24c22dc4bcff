"""Excludes services on this machine and inside the cluster from proxies."""

import ipaddress
import os
from collections.abc import MutableMapping
from urllib.parse import urlsplit

_LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]", "127.0.0.0/8")
_CLUSTER_DOMAINS = (".svc", ".cluster.local")
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy")
_SERVICE_VARIABLES = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
)


def bypass_proxies_for_local_services(environment: MutableMapping[str, str] = os.environ) -> None:
    """Excludes local services from proxies in no_proxy and NO_PROXY.

    Adds loopback, cluster domains and the local services that ``environment`` names. Both variables
    get the union of both, because requests, urllib, botocore and reqwest (obstore) differ in which
    one they read first. Does nothing if no proxy is configured.
    """
    if not any(environment.get(name) or environment.get(name.upper()) for name in _PROXY_VARIABLES):
        return
    values = [environment.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    entries = [entry.strip() for value in values for entry in value.split(",") if entry.strip()]
    hosts = [_host(environment[name]) for name in _SERVICE_VARIABLES if environment.get(name)]
    local = [host for host in hosts if host is not None and is_local(host)]
    merged = ["*"] if "*" in entries else [*entries, *_LOOPBACK, *_CLUSTER_DOMAINS, *local]
    for name in ("no_proxy", "NO_PROXY"):
        environment[name] = ",".join(dict.fromkeys(merged))


def is_local(host: str) -> bool:
    """Returns whether ``host`` is this machine, a name without a dot or a Kubernetes service."""
    name = host.strip("[]").rstrip(".").lower()
    return (
        is_loopback(name)
        or (":" not in name and "." not in name)
        or name.endswith(_CLUSTER_DOMAINS)
    )


def is_loopback(host: str) -> bool:
    """Returns whether ``host`` is localhost, a loopback address or the unspecified address."""
    name = host.strip().strip("[]").rstrip(".").lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _host(url: str) -> str | None:
    try:
        return urlsplit(url if "://" in url else f"//{url}").hostname
    except ValueError:
        return None  # the client that connects to it reports the error
