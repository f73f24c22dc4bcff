"""Writes the configuration files of the cluster's programs, as JSON where they read YAML.

All addresses are inside the cluster's network namespace, so fixed ones do not conflict with the
machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from state import KUBERNETES, State

NODE = "convoy-node"
NODE_IP = "10.88.0.1"
POD_CIDR = "10.88.0.0/16"
SERVICE_CIDR = "10.96.0.0/16"
FIRST_SERVICE = "10.96.0.1"
API_PORT = 6443
CLUSTER = "convoy"
STORAGE_CLASS = "standard"
NUM_VOLUMES = 60


def pki(state: State) -> Path:
    return state.folder / "kwok/clusters" / CLUSTER / "pki"


def kwokctl(state: State, programs: Path) -> str:
    """Return the configuration of the control plane.

    It has etcd, API server, controller manager, scheduler, and kwok for simulated nodes.
    """
    admin = pki(state) / "admin"

    def patch(component: str, override: bool = False, **arguments: str) -> dict[str, Any]:
        extra = [
            {"key": key.replace("_", "-"), "value": value, "override": override}
            for key, value in arguments.items()
        ]
        return {"name": component, "extraArgs": extra}

    options = {
        "runtime": "binary",
        "kubeVersion": f"v{KUBERNETES}",
        "etcdBinary": str(programs / "etcd"),
        "kubeApiserverBinary": str(programs / "kube-apiserver"),
        "kubeControllerManagerBinary": str(programs / "kube-controller-manager"),
        "kubeSchedulerBinary": str(programs / "kube-scheduler"),
        "kwokControllerBinary": str(programs / "kwok"),
        "kubectlBinary": str(programs / "kubectl"),
        "kubeApiserverPort": API_PORT,
        "kubeApiserverCertSANs": [FIRST_SERVICE, NODE_IP],
        "kubeFeatureGates": "GenericWorkload=true",
        "kubeRuntimeConfig": "scheduling.k8s.io/v1beta1=true",
        "kubeAuthorization": True,
        "kubeAdmission": True,
    }
    patches = [
        patch(
            "kube-apiserver",
            service_cluster_ip_range=SERVICE_CIDR,
            advertise_address=NODE_IP,
            kubelet_client_certificate=f"{admin}.crt",
            kubelet_client_key=f"{admin}.key",
            kubelet_preferred_address_types="InternalIP",
        ),
        # There is only one instance of each. Without this, a machine that pauses for a while would
        # end them.
        patch("kube-controller-manager", leader_elect="false"),
        patch("kube-scheduler", leader_elect="false"),
        # Without this, kwok would also simulate the real node.
        patch("kwok-controller", True, manage_all_nodes="false"),
        patch("kwok-controller", manage_nodes_with_annotation_selector="kwok.x-k8s.io/node=fake"),
    ]
    return json.dumps(
        {
            "apiVersion": "config.kwok.x-k8s.io/v1alpha1",
            "kind": "KwokctlConfiguration",
            "options": options,
            "componentsPatches": patches,
        },
        indent=2,
    )


def containerd(state: State, store: Path) -> str:
    """Return containerd's configuration.

    Tasks are in the state folder, images in the store, which the next cluster reuses.
    """
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    return f"""version = 2
root = "{store}"
state = "{state.folder}/containerd"
[grpc]
address = "{state.containerd}"
[plugins."io.containerd.internal.v1.opt"]
path = "{state.folder}/opt"
[{cri}]
sandbox_image = "localhost/pause:3.10"
restrict_oom_score_adj = true
stream_server_address = "127.0.0.1"
[{cri}.cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{state.folder}/cni"
[{cri}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[{cri}.containerd.runtimes.runc.options]
SystemdCgroup = false
"""


def cni() -> str:
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": POD_CIDR, "rangeStart": "10.88.1.0", "gateway": NODE_IP}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    return json.dumps(
        {
            "cniVersion": "1.0.0",
            "name": CLUSTER,
            "plugins": [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}],
        }
    )


def kubelet(state: State) -> str:
    return json.dumps(
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": NODE_IP,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(pki(state) / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": f"unix://{state.containerd}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{state.cgroup}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "clusterDNS": [NODE_IP],
            "clusterDomain": "cluster.local",
            "resolvConf": str(state.folder / "resolv.conf"),
            "podLogsDir": str(state.folder / "pods"),
            "volumePluginDir": str(state.folder / "kubelet-plugins"),
            "serializeImagePulls": False,
            # Time until a pod sees a new Secret: the operator waits for its webhook's certificate.
            "syncFrequency": "2s",
            # No registry has the images, so the kubelet must never delete them to free disk space.
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "evictionHard": {
                "memory.available": "200Mi",
                "nodefs.available": "1Gi",
                "imagefs.available": "1Gi",
                "nodefs.inodesFree": "1%",
            },
        },
        indent=2,
    )


def kube_proxy(state: State) -> str:
    return json.dumps(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "iptables",
            "clusterCIDR": POD_CIDR,
            "hostnameOverride": NODE,
            "clientConnection": {"kubeconfig": str(state.inner_kubeconfig)},
            # These settings apply to the whole machine and stay unchanged.
            "conntrack": {
                "maxPerCore": 0,
                "min": 0,
                "tcpEstablishedTimeout": "0s",
                "tcpCloseWaitTimeout": "0s",
            },
            "iptables": {"minSyncPeriod": "100ms"},
        },
        indent=2,
    )


def volumes(state: State) -> list[dict[str, Any]]:
    """Return the default StorageClass and its volumes, created in advance; each serves one claim.

    They are local volumes, because the kubelet applies a pod's fsGroup to these, as in a cloud.
    Otherwise only root could write.
    """
    storage_class = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": STORAGE_CLASS,
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
        },
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "WaitForFirstConsumer",
    }
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE]}
    made = []
    for number in range(NUM_VOLUMES):
        folder = state.folder / f"volumes/{number:03}"
        folder.mkdir(parents=True, exist_ok=True)
        specification = {
            "storageClassName": STORAGE_CLASS,
            "capacity": {"storage": "100Gi"},
            "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "local": {"path": str(folder)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
        }
        made.append(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"local-{number:03}"},
                "spec": specification,
            }
        )
    return [storage_class, *made]


def corefile(state: State) -> str:
    # Without a cache: a rendezvous host must resolve as soon as its pod runs.
    return f""". {{
    bind {NODE_IP}
    errors
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {state.inner_kubeconfig}
    }}
}}
"""
