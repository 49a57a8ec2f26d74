"""Which implementation of an op runs on a device: the one place that decides."""

from types import ModuleType

import torch

from fastpref_kernels import token_logps_kl_torch, token_logps_torch

_PORTABLE = {"token_logps": token_logps_torch, "token_logps_kl": token_logps_kl_torch}


def implementation(op: str, device: torch.device) -> ModuleType:
    """Module that holds `<op>_fwd` and `<op>_bwd` for tensors on `device`.

    Plain torch runs on every device; a faster module for some of them is chosen here.
    """
    return _PORTABLE[op]
