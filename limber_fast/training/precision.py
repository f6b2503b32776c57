"""In which precision the demo's products run."""

import torch


def autocast() -> torch.autocast:
    """bf16 where torch has fast bf16 products for this CPU, else fp32: elsewhere bf16 products take over ten times as
    long as fp32 ones."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported())
