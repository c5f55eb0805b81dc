"""What `kernels.py` measures, one module for each kind of operation.

A module has `cases() -> list[Case]`, and may have `sweep() -> list[Case]`: the same with other settings of its kernels,
named in `size`, for `kernels.py --sweep`. Nothing touches the GPU until a case's `make` is called.
"""
