"""Every kernel on a real GPU, against its oracle. Without one these tests are SKIPPED, and say so."""

import pytest
import torch

from tests.kernels import parity
from tests.kernels.place import Place
from tests.kernels.poison import poisoned_outputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*[Dd]eterministic"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
CASES = parity.every_case()


@pytest.mark.parametrize("case", CASES)
def test_the_compiled_kernel_agrees_with_its_oracle(case):
    with poisoned_outputs():
        CASES[case](Place("cuda", interpret=False))
