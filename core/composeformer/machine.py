"""What this machine's PyTorch can do, tried rather than guessed: devices, dtypes, backends."""

import os

import torch


def probe() -> list[tuple[str, str, str]]:
    """Rows of (what, status, detail); status is `ok` or `absent`."""
    rows = [("threads", "ok", f"{torch.get_num_threads()} of {os.cpu_count()} processors")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"compute capability {properties.major}.{properties.minor}"
            rows.append(
                (
                    f"cuda:{index}",
                    "ok",
                    f"{properties.name}, {properties.total_memory / 1e9:.1f} GB, {capability}",
                )
            )
    else:
        built = torch.version.cuda
        why = (
            f"PyTorch is built for CUDA {built} but finds no device"
            if built
            else "this build of PyTorch is for the CPU"
        )
        rows.append(("cuda", "absent", why))
    for name in ("bfloat16", "float16", "float8_e4m3fn"):
        rows.append((f"matmul {name}", *_product(getattr(torch, name))))
    rows.append(_distributed())
    return rows


def _product(dtype: torch.dtype) -> tuple[str, str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        x = torch.ones(16, 16, device=device).to(dtype)
        if dtype.itemsize == 1:
            one = torch.ones((), device=device)
            torch._scaled_mm(x, x.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
        else:
            x @ x
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return "absent", f"{device}: " + " ".join(str(error).split())[:120]
    return "ok", device


def _distributed() -> tuple[str, str, str]:
    import torch.distributed as dist

    if not dist.is_available():
        return "distributed", "absent", "this build of PyTorch has no torch.distributed"
    backends = [
        name
        for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available()))
        if there
    ]
    return "distributed", "ok" if backends else "absent", ", ".join(backends) or "no backend"
