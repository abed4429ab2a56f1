"""What the Gluon kernels for Hopper share: tiles by the copy engine, and the ring they come by.

A ring has STAGES slots in shared memory, and of each two barriers: `full`, at which a copied tile
arrives, and `empty`, at which those who read it do. A partition goes through the slots in order;
the parity of the round is what its barriers are waited for with.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.9 renamed what 3.6 and 3.7 call async_copy_*: (descriptor, coordinates, barrier, slot)
# and (descriptor, coordinates, buffer).
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
# Waits for the threads of this partition; Triton 3.7 renamed it.
synchronize = getattr(gl, "barrier", None) or gl.thread_barrier

_RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def seen_as(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """The same bytes of shared memory as an array of another shape."""
    if _RENAMED:
        view = memory.reinterpret(dtype, shape, layout)
    else:
        view = memory._reinterpret(dtype, shape, layout)
    return view


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The next slot of a ring, and the parity of the round that it belongs to."""
    slot += 1
    wrapped = slot == STAGES
    return gl.where(wrapped, 0, slot), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def slot_before(slot, STAGES: gl.constexpr):
    """The slot before a slot.

    Not a variable kept from the step before: Triton takes a name that a loop gives the value of
    another for unchanged by the loop, if it had that value before the loop.
    """
    return gl.where(slot == 0, STAGES - 1, slot - 1)
