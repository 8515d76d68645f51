"""Where Megatron says "cuda", torch hears "cpu"; nothing else changes."""

import pytest
import torch

from megatron_s2.training.cpu_runtime import _CpuInsteadOfCuda, enable_cpu_runtime


@pytest.mark.parametrize(
    "device", ["cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 3)], ids=str
)
def test_tensors_meant_for_a_gpu_are_made_on_the_cpu(device):
    with _CpuInsteadOfCuda():
        assert torch.zeros(2, device=device).device.type == "cpu"
        assert torch.tensor(0, device=device).device.type == "cpu"
        assert torch.ones(2).to(device).device.type == "cpu"
        assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"


def test_pinning_and_streams_are_nothing_to_a_cpu_tensor():
    with _CpuInsteadOfCuda():
        tensor = torch.empty(4, pin_memory=True)
        assert not tensor.is_pinned()
        assert tensor.pin_memory() is tensor
        assert tensor.cuda(non_blocking=True) is tensor


def test_the_type_string_tells_precision_as_megatron_expects():
    with _CpuInsteadOfCuda():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1).type(torch.float64).dtype is torch.float64


def test_other_devices_and_values_are_left_alone():
    with _CpuInsteadOfCuda():
        assert torch.zeros(2, device="meta").device.type == "meta"
        assert torch.full((2,), 3).tolist() == [3, 3]
        assert torch.ones(2, 3).sum(0).tolist() == [2, 2, 2]


@pytest.mark.gpu
def test_a_gpu_is_never_hidden():
    with pytest.raises(ValueError, match="a GPU is available"):
        enable_cpu_runtime()
