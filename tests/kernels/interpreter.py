"""What Triton's interpreter needs before loops can run to a bound that a kernel computes.

It keeps scalars as arrays of one entry, which numpy 2.4 no longer turns into integers by itself.
"""

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_with_index(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def let_scalars_bound_loops():
    """Make the interpreter's scalars usable in range()."""
    interpreter._patch_lang_tensor = _patch_with_index
