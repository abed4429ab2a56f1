import torch
import torch.nn.functional as F
from fuse_swiglu import fuse_swiglu, search

from triton_only_backend.testing import PassTestCase

GATE, UP = torch.randn(3, 5), torch.randn(3, 5)


class TestFuseSwiglu(PassTestCase):
    def test_fuses(self) -> None:
        run = self.assertPass(fuse_swiglu, self.capture(search, GATE, UP), times=1)
        self.assertGraph(
            run,
            """\
arg0_1: f32[3, 5]
arg1_1: f32[3, 5]
swiglu: f32[3, 5] = example.swiglu(arg0_1, arg1_1)
return (swiglu,)""",
        )

    def test_any_size_and_on_a_gpu_that_is_not_there(self) -> None:
        gm = self.capture(search, GATE, UP, dynamic=True, device="cuda")
        self.assertDynamic(fuse_swiglu, gm)

    def test_a_silu_that_is_read_twice_stays(self) -> None:
        gm = self.capture(lambda g, u: (lambda s: (s * u, s))(F.silu(g)), GATE, UP)
        self.assertRefused(fuse_swiglu, gm)
        with self.assertRaisesRegex(AssertionError, "matched 4 of 5 .*`div` has a second user"):
            self.assertFired(fuse_swiglu, gm)
