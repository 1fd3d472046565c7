"""A GPU that is never waited for: what is computed there is not read back before the loss is known.

On numbers that say they are on a GPU, and have no values; what is on the host is real. On a GPU itself:
`test_cuda.py::test_nothing_waits_for_the_gpu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from test_talker_module import SPEECH, TOKENIZER, speech_sample, talking_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker
from toy_training import step_samples, toy_model

from omnitrain.data.batch import PackedBatch
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.settings import AudioGeometry, MediaLimits, VisionGeometry
from omnitrain.models.layers.cross_entropy import chunked_cross_entropy
from omnitrain.models.layers.decoder import Attention
from omnitrain.models.layers.moe import TopKRouter
from omnitrain.models.talker import TalkerInputs
from omnitrain.parallel.rehearsal import fake_numbers
from omnitrain.training.losses import talker_loss, token_weights
from omnitrain.training.transfer import for_training

_aten = torch.ops.aten
READS = {
    _aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal, _aten.is_nonzero, _aten.bincount,
    _aten.unique_dim, _aten.unique_consecutive, _aten._unique2, _aten._unique,
}  # fmt: skip
"""Operations whose result, or its shape, the host has to wait for."""


class NoHostReads(TorchDispatchMode):
    """Fails, with the module, where a number of the GPU is read; computes on the host what is on the host."""

    def __init__(self, tracker: ModuleTracker) -> None:
        super().__init__()
        self.tracker, self.seen = tracker, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        on_gpu = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        to = torch.device(kwargs.get("device") or "cpu")
        if not on_gpu and to.type == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        packet = func.overloadpacket
        self.seen.add(str(packet))
        reads = packet in READS or (packet is _aten.repeat_interleave and kwargs.get("output_size") is None)
        if packet is _aten._to_copy and "device" in kwargs:  # from the host without waiting, or not at all
            reads = to.type == "cpu" if on_gpu else not kwargs.get("non_blocking")
        if packet is _aten.copy_:
            reads = not isinstance(args[0], FakeTensor)
        if packet in (_aten.index, _aten.index_put, _aten.index_put_):
            indices = [i for i in args[1] if i is not None]
            reads = any(i.dtype == torch.bool or not isinstance(i, FakeTensor) for i in indices)
        assert not reads, f"{func} in {' '.join(sorted(self.tracker.parents))}"
        return func(*args, **kwargs)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A mode in which ``cuda`` is there but for values, and bf16 is the precision of products."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    with ModuleTracker() as tracker, FakeTensorMode(allow_non_fake_inputs=True), NoHostReads(tracker) as mode:
        yield mode
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


def on_gpu(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            fake = torch.empty(p.shape, dtype=p.dtype, device="cuda")
            module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
    return model


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_no_number_is_read_from_the_gpu_before_the_loss(gpu: NoHostReads) -> None:
    """Encoders, Thinker and the loss of a pack of every modality; Talker, MTP and their loss."""
    model, batch = on_gpu(toy_model()), for_training(PackedBatch.pack(step_samples(0)), torch.device("cuda"))
    output = model(**batch.model_inputs())
    loss = chunked_cross_entropy(output.hidden, model.output_embedding, batch.labels, token_weights(batch, {}), chunk=8)
    assert loss.total.is_cuda
    assert len(output.router_counts) == 2
    assert {"torch_attn._varlen_attn", "aten._grouped_mm", "aten.convolution", "aten.mm"} <= gpu.seen

    model = on_gpu(talking_model())
    encoder = SampleEncoder(
        tokenizer=TOKENIZER, audio=AudioGeometry(), vision=VisionGeometry(), limits=MediaLimits(),
        vocab_size=TOKENIZER.vocab_size, speech=SPEECH,
    )  # fmt: skip
    samples = [encoder(speech_sample(i), lambda segment: segment.media or b"") for i in range(2)]
    batch = for_training(PackedBatch.pack(samples), torch.device("cuda"))
    inputs = TalkerInputs(**batch.spoken.inputs())
    x = model.talker.embed(inputs, model.thinker.embed_tokens, model(**batch.model_inputs()).accept_hidden)
    output = model.talker(x, inputs.position_ids, inputs.cu_seqlens)
    total, by_codebook = talker_loss(model.talker, output.hidden, inputs, chunk=8)
    assert total.is_cuda
    assert len(by_codebook) == inputs.codes.shape[1]


def test_nor_before_the_gradients() -> None:
    """Numbers that are no whole ones, of which a rehearsal has no values."""

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            fake = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(args))
            assert not (fake and func.overloadpacket in READS), func
            return func(*args, **(kwargs or {}))

    with fake_numbers(as_on_gpu=True):
        model, batch = toy_model(), PackedBatch.pack(step_samples(0))
        model.set_activation_checkpointing(["thinker"])
        with Reads():
            with torch.autocast("cpu", torch.bfloat16):
                output = model(**batch.model_inputs())
                loss = chunked_cross_entropy(output.hidden, model.output_embedding, batch.labels, chunk=8)
            (loss.total + output.router_prob_sums.sum()).backward()
            with pytest.raises(AssertionError, match="_local_scalar_dense"):
                float(loss.total.detach())
        assert all(p.grad is not None for p in model.parameters())


def test_a_read_is_found_and_its_module_named(gpu: NoHostReads, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = on_gpu(toy_model()), for_training(PackedBatch.pack(step_samples(3)), torch.device("cuda"))

    def reading(self: Attention, *args: Any) -> Any:
        return args[0] * int(args[2].diff().max())

    def counting(self: TopKRouter, x: Tensor) -> Any:
        return torch.bincount(x.argmax(-1))

    for kind, instead, place in (
        (Attention, reading, r"_local_scalar_dense.*layers\.0\.attention"),
        (TopKRouter, counting, r"bincount.*layers\.0\.mlp\.router"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", instead)
            with pytest.raises(AssertionError, match=place):
                model(**batch.model_inputs())
