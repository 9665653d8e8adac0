"""HTTPS with the certificates that ``--ca``, ``--cert`` and ``--key`` name."""

from __future__ import annotations

import os
import ssl

from veneer_loadtest.errors import BadOption


def https_context() -> ssl.SSLContext:
    """Return a context that trusts VENEER_CA, or else the system's certificates, and presents
    VENEER_CERT with VENEER_KEY.

    Raises:
        BadOption: a file cannot be used.
    """
    ca, cert, key = (os.environ.get(f"VENEER_{name}") for name in ("CA", "CERT", "KEY"))
    try:
        context = ssl.create_default_context(cafile=ca or None)
        if cert or key:
            context.load_cert_chain(cert or "", key or None)
    except (OSError, ValueError) as error:  # TLS errors are OSErrors
        raise BadOption(
            f"the certificate files cannot be used ({error}): check --ca, --cert and --key, "
            "or VENEER_CA, VENEER_CERT and VENEER_KEY",
            metadata={"field": "--ca"},
        ) from error
    return context
