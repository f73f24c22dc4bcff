"""``convoy secrets``: writes credentials for the services in ``k8s/base/services``.

kustomize creates Secrets from these files.
"""

import os
import secrets
from pathlib import Path

from trainer.errors import UserError


def write_secrets(file: Path, endpoint: str) -> list[Path]:
    """Write random credentials to two files that only their owner can read.

    The object store's go to ``file``, the database's to a file next to it. Returns both paths.
    Raises UserError if either exists, because services that use it would be locked out.
    """
    database = file.with_name(f"{file.stem}-postgres{file.suffix}")
    contents = {
        file: {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": secrets.token_hex(10).upper(),
            "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(30),
        },
        database: {
            "POSTGRES_USER": "mlflow",
            "POSTGRES_DB": "mlflow",
            "POSTGRES_PASSWORD": secrets.token_urlsafe(30),
        },
    }
    existing = [str(path) for path in contents if path.exists()]
    if existing:
        raise UserError(
            *(
                f"{path}: already exists; remove it first if no running service uses it"
                for path in existing
            )
        )
    for path, values in contents.items():
        try:
            with os.fdopen(
                os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w"
            ) as opened:
                opened.writelines(f"{name}={value}\n" for name, value in values.items())
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    return list(contents)
