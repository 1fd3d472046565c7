"""Sizes of every part of the model, and the presets: dataclasses without torch, so that a configuration costs nothing.

Names follow the paper; the public configuration's names stand beside them where they differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from omnitrain.vocabulary import SpecialCodes

TRIMS = ("public", "causal")
"""How a transposed convolution's output is cut (`Code2WavConfig.trim`)."""

PUBLIC_SPECIAL_TOKENS: dict[str, int] = {
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
    "<|audio_start|>": 151669,
    "<|audio_end|>": 151670,
    "<tts_pad>": 151671,
    "<tts_text_bos>": 151672,
    "<tts_text_eod>": 151673,
    "<|audio_pad|>": 151675,
    "system": 8948,
    "user": 872,
    "assistant": 77091,
}
"""Ids of the public tokenizer."""


def _must_be_equal(sizes: Any, one: str, other: str, within: str = "") -> None:
    """ValueError unless two dotted fields of `sizes`, which is itself at `within`, have the same value."""
    a, b = attrgetter(one, other)(sizes)
    if a != b:
        raise ValueError(f"{within}{one} ({a}) must equal {within}{other} ({b})")


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Lists, as YAML and OmegaConf have them, become tuples."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), list):
                object.__setattr__(self, f.name, tuple(value))


# ----------------------------------------------------------------------------------------------------------- what reads


@dataclass(frozen=True, kw_only=True)
class AuTConfig(_Sizes):
    """Sizes of AuT, the audio encoder; the defaults are the public ones.

    Attributes:
        d_model, layers, heads, ffn: the transformer (`encoder_layers`, `encoder_attention_heads`, `encoder_ffn_dim`)
        out_dim: width of the features, that of the Thinker (`output_dim`)
        conv_hidden: channels of the three convolutions (`downsample_hidden_size`)
        n_mels: mel bands (`num_mel_bins`)
        chunk_frames: mel frames per convolution chunk, 100 = 1 s (`n_window` * 2)
        window_frames: longest stretch of mel frames that attention spans, 800 = 8 s (`n_window_infer`)
    """

    d_model: int = 1280
    layers: int = 32
    heads: int = 20
    ffn: int = 5120
    out_dim: int = 2048
    conv_hidden: int = 480
    n_mels: int = 128
    chunk_frames: int = 100
    window_frames: int = 800

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.heads:
            raise ValueError(f"AuTConfig: d_model ({self.d_model}) must be a multiple of heads ({self.heads})")
        if self.d_model % 2 or self.d_model < 4:
            raise ValueError(f"AuTConfig: d_model ({self.d_model}) must be even and at least 4 for the sinusoids")
        self.chunks(self.window_frames)

    def chunks(self, window_frames: int) -> int:
        """Convolution chunks in an attention window of so many mel frames. ValueError if they are no whole number."""
        chunks, rest = divmod(window_frames, self.chunk_frames)
        if rest or chunks < 1:
            raise ValueError(f"window_frames ({window_frames}) must be a positive multiple of {self.chunk_frames}")
        return chunks


@dataclass(frozen=True, kw_only=True)
class AuTDecoderConfig(_Sizes):
    """Sizes of the decoder that AuT is trained with. Not published; as deep and wide as asked for.

    Attributes:
        d_model, layers, heads, ffn: the transformer; d_model is the encoder's
        vocab_size: of the tokenizer
    """

    d_model: int = 1280
    layers: int = 8
    heads: int = 20
    ffn: int = 5120
    vocab_size: int = 152064

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.heads:
            raise ValueError(f"AuTDecoderConfig: d_model ({self.d_model}) must be a multiple of heads ({self.heads})")


@dataclass(frozen=True, kw_only=True)
class AuTModelConfig(_Sizes):
    """Sizes of an `AuT`: encoder and decoder.

    Attributes:
        encoder, decoder: sizes of the parts. `encoder.out_dim` is not used: projecting to a Thinker is the Thinker's.
        ctc_slots: bytes (or blanks) that a CTC head on the encoder writes for each feature, for the loss of that name
            and for alignments; 0: no such head
    """

    encoder: AuTConfig = field(default_factory=AuTConfig)
    decoder: AuTDecoderConfig = field(default_factory=AuTDecoderConfig)
    ctc_slots: int = 0

    def __post_init__(self) -> None:
        _must_be_equal(self, "decoder.d_model", "encoder.d_model")


@dataclass(frozen=True, kw_only=True)
class VisionConfig(_Sizes):
    """Sizes of the vision encoder; the defaults are the public ones.

    Attributes:
        d_model, layers, heads, ffn: the transformer (`hidden_size`, `depth`, `num_heads`, `intermediate_size`)
        out_dim: width of the features, that of the Thinker (`out_hidden_size`)
        patch: pixels along a patch's side (`patch_size`)
        temporal_patch: frames per patch; a picture counts as that many equal frames (`temporal_patch_size`)
        merge: merge x merge patches become one feature (`spatial_merge_size`)
        channels: colour channels (`in_channels`)
        grid_side: the learned positions are a grid_side x grid_side table (`num_position_embeddings` = grid_side^2)
        deepstack_layers: layers (from 0) after which one level of deepstack features is taken
            (`deepstack_visual_indexes`)
        rope_theta: base of the 2-D rotary frequencies
    """

    d_model: int = 1152
    layers: int = 27
    heads: int = 16
    ffn: int = 4304
    out_dim: int = 2048
    patch: int = 16
    temporal_patch: int = 2
    merge: int = 2
    channels: int = 3
    grid_side: int = 48
    deepstack_layers: tuple[int, ...] = (8, 16, 24)
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % (4 * self.heads):
            raise ValueError(
                f"VisionConfig: d_model / heads ({self.d_model} / {self.heads}) must be a multiple of 4: half of "
                "a head's rotary pairs turn with the row, half with the column"
            )
        if sorted(set(self.deepstack_layers)) != list(self.deepstack_layers) or not all(
            0 <= i < self.layers for i in self.deepstack_layers
        ):
            raise ValueError(
                f"VisionConfig: deepstack_layers {self.deepstack_layers} must rise and lie in 0..{self.layers - 1}"
            )

    @property
    def patch_dim(self) -> int:
        """Numbers per patch: channels * temporal_patch * patch * patch."""
        return self.channels * self.temporal_patch * self.patch**2


# -------------------------------------------------------------------------------------------------------- the decoders


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(_Sizes):
    """What Thinker and Talker have alike: decoders with experts and TM-RoPE.

    Attributes:
        d_model: width of the residual stream (`hidden_size`)
        heads, kv_heads, head_dim: grouped-query attention; head_dim need not be d_model / heads
        n_experts, top_k, expert_width: routed experts of a layer (`num_experts`, `num_experts_per_tok`,
            `moe_intermediate_size`)
        normalise_top_k: mixing weights sum to one (`norm_topk_prob`)
        mrope_sections: frequencies of t, h, w; they sum to head_dim / 2
        rope_theta: base of the rotary frequencies
        max_positions: longest position id the model is meant for (`max_position_embeddings`)
    """

    d_model: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    n_experts: int
    top_k: int
    expert_width: int
    normalise_top_k: bool = True
    mrope_sections: tuple[int, int, int] = (24, 20, 20)
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    attention_bias: bool = False
    max_positions: int = 65536

    def __post_init__(self) -> None:
        super().__post_init__()
        part = type(self).__name__.removesuffix("Config").lower()
        if self.heads % self.kv_heads:
            raise ValueError(f"{part}.heads ({self.heads}) must be a multiple of {part}.kv_heads ({self.kv_heads})")
        if 2 * sum(self.mrope_sections) != self.head_dim:
            raise ValueError(
                f"{part}.mrope_sections {self.mrope_sections} must sum to head_dim / 2 = {self.head_dim // 2}"
            )
        axis_of_frequency(self.mrope_sections)
        if not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"{part}.top_k ({self.top_k}) must lie in 1..n_experts ({self.n_experts})")


def axis_of_frequency(sections: tuple[int, int, int]) -> list[int]:
    """Axis (0 t, 1 h, 2 w) of each of the sum(sections) frequencies, from the highest to the lowest. ValueError if the
    interleaving cannot give h and w their share."""
    half = sum(sections)
    axes = [i % 3 if i % 3 and i < 3 * sections[i % 3] else 0 for i in range(half)]
    if tuple(axes.count(a) for a in range(3)) != tuple(sections):
        raise ValueError(f"mrope_sections {sections}: t must have at least as many frequencies as h and w")
    return axes


@dataclass(frozen=True, kw_only=True)
class ThinkerConfig(DecoderConfig):
    """Sizes of the Thinker; for the other fields see `DecoderConfig`.

    Attributes:
        ffn: width of a dense layer's SwiGLU (`intermediate_size`)
        dense_layers: indices of layers with a dense MLP (`mlp_only_layers`)
        sparse_step: layer i has experts if (i + 1) is a multiple of it (`decoder_sparse_step`)
        accept_hidden_layer: the Talker reads the residual stream after this many layers (before deepstack is added)
    """

    vocab_size: int
    ffn: int
    dense_layers: tuple[int, ...] = ()
    sparse_step: int = 1
    accept_hidden_layer: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.accept_hidden_layer < self.layers:
            raise ValueError(f"accept_hidden_layer ({self.accept_hidden_layer}) must lie in 0..layers - 1")

    def is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has experts."""
        return layer not in self.dense_layers and (layer + 1) % self.sparse_step == 0


@dataclass(frozen=True, kw_only=True)
class MTPConfig(_Sizes):
    """Sizes of MTP; the defaults are the public checkpoint's.

    Attributes:
        d_model: width, the same as the Talker's (`hidden_size`)
        heads, kv_heads, head_dim: grouped-query attention
        ffn: width of the SwiGLU (`intermediate_size`)
        codebooks: codes of a frame, the Talker's included (`num_code_groups`)
        codebook_size: codes per codebook (`vocab_size`)
        rope_theta: base of the rotary frequencies (one id per position: no TM-RoPE here)
        max_positions: written to the public configuration, not read (`max_position_embeddings`)
    """

    d_model: int = 1024
    layers: int = 5
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    ffn: int = 3072
    codebooks: int = 16
    codebook_size: int = 2048
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    attention_bias: bool = False
    max_positions: int = 32768

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads % self.kv_heads:
            raise ValueError(f"mtp.heads ({self.heads}) must be a multiple of mtp.kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"mtp.head_dim ({self.head_dim}) must be even: rotary positions turn pairs")
        if self.codebooks < 2:
            raise ValueError(f"mtp.codebooks ({self.codebooks}) must be at least 2: the Talker predicts the first")


@dataclass(frozen=True, kw_only=True)
class TalkerConfig(DecoderConfig, SpecialCodes):
    """Sizes of the Talker; the defaults are the public checkpoint's. For the other fields see `DecoderConfig`.

    Attributes:
        shared_expert_width: of the expert that sees every token (`shared_expert_intermediate_size`)
        codec_vocab: codes of codebook 0, then 1024 for special codes and voices (`vocab_size`). Programs that read
            public checkpoints forbid the last 1024 codes but `codec_eos`: with other sizes codes would be lost there.
        thinker_dim: width of the Thinker (`thinker_hidden_size`)
        projection_width: inner width of the two projections (`intermediate_size`)
        accept_hidden_layer: the Thinker's layer that `hidden_projection` reads; equals the Thinker's own setting
        codebooks, codebook_size: codes of a frame, codes of each codebook (`num_code_groups`)
        codec_*: special codes (`codec_pad_id`, ...).  speakers: code of each voice (`speaker_id`)
        frames_per_word: from one text token to the next. 1, as the public checkpoint has it: the text is read long
            before it is said, and whose turn it is has to be found in it. About as many as a token takes to be said:
            the text keeps step with the voice, which a small Talker learns to read much sooner.
    """

    d_model: int = 1024
    layers: int = 20
    heads: int = 16
    kv_heads: int = 2
    head_dim: int = 128
    n_experts: int = 128
    top_k: int = 6
    expert_width: int = 384
    shared_expert_width: int = 768
    codec_vocab: int = 3072
    thinker_dim: int = 2048
    projection_width: int = 2048
    accept_hidden_layer: int = 24
    codebooks: int = 16
    codebook_size: int = 2048
    codec_pad: int = 2148
    codec_bos: int = 2149
    codec_eos: int = 2150
    codec_nothink: int = 2155
    codec_think_bos: int = 2156
    codec_think_eos: int = 2157
    speakers: dict[str, int] = field(default_factory=lambda: {"chelsie": 2301, "ethan": 2302, "aiden": 2303})
    mtp: MTPConfig = field(default_factory=MTPConfig)
    frames_per_word: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames_per_word < 1:
            raise ValueError(f"talker.frames_per_word ({self.frames_per_word}) must be 1 or more")
        for name in ("d_model", "codebooks", "codebook_size"):
            _must_be_equal(self, f"mtp.{name}", name, within="talker.")
        special = self.special_codes() | {f"speakers.{name}": code for name, code in self.speakers.items()}
        for name, code in special.items():
            if name != "codebook_size" and not self.codebook_size <= code < self.codec_vocab:
                raise ValueError(
                    f"talker.{name} ({code}) must lie in codebook_size..codec_vocab - 1 "
                    f"({self.codebook_size}..{self.codec_vocab - 1})"
                )


def codec_vocabulary(codebook_size: int) -> dict[str, Any]:
    """The `TalkerConfig` fields that depend on the size of codebook 0, laid out as in the public checkpoint."""
    public = TalkerConfig()
    ids = {"codec_vocab": public.codec_vocab, **public.special_codes()}
    shift = codebook_size - public.codebook_size
    return {
        **{name: code + shift for name, code in ids.items()},
        "speakers": {name: code + shift for name, code in public.speakers.items()},
    }


# ------------------------------------------------------------------------------------------------------------ waveforms


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(_Sizes):
    """The transformer over frames that Code2Wav and the codec's encoder have alike (`SlidingWindowTransformer`).

    Attributes:
        layers, heads, kv_heads, ffn: (`num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`,
            `intermediate_size`)
        window: frames that a frame sees, itself included (`sliding_window`)
        layer_scale: where the learned scales of the branches start (`layer_scale_initial_scale`)
        rope_theta: base of the rotary frequencies
        norm_eps: of the norms (`rms_norm_eps`)
    """

    layers: int = 8
    heads: int = 16
    kv_heads: int = 16
    ffn: int = 3072
    window: int = 72
    layer_scale: float = 0.01
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def _check(self, d_model: int, may_be_zero: tuple[str, ...] = ()) -> None:
        """ValueError that names the first field with a number that is not positive, or heads that do not fit."""
        name = type(self).__name__
        for f in fields(self):
            value = getattr(self, f.name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and number <= 0 and not (number == 0 and f.name in may_be_zero):
                    raise ValueError(f"{name}: {f.name} is {value}; it must be positive")
        if d_model % (2 * self.heads):
            raise ValueError(f"{name}: d_model ({d_model}) must be a multiple of 2 * heads (2 * {self.heads})")
        if self.heads % self.kv_heads:
            raise ValueError(f"{name}: heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")


@dataclass(frozen=True, kw_only=True)
class Code2WavConfig(TransformerConfig):
    """Sizes of Code2Wav; the defaults are the public ones. For the other fields see `TransformerConfig`.

    Attributes:
        quantizers, codebook_size: codes per frame, and values of a code (`num_quantizers`)
        d_model: width of the frames (`hidden_size`)
        upsampling_ratios: first upsamplings, each followed by a ConvNeXt block, at width d_model
        decoder_dim: channels behind them; halved by each of
        upsample_rates: the upsamplings to samples
        trim: "public" cuts both ends of a transposed convolution's output as the public model does, so that the
            waveform is 555 samples short at public size; "causal" cuts the end alone, so that every frame gives
            `samples_per_frame` samples
    """

    quantizers: int = 16
    codebook_size: int = 2048
    d_model: int = 1024
    upsampling_ratios: tuple[int, ...] = (2, 2)
    decoder_dim: int = 1536
    upsample_rates: tuple[int, ...] = (8, 5, 4, 3)
    trim: str = "public"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.d_model)
        if self.trim not in TRIMS:
            raise ValueError(f"Code2WavConfig: trim is {self.trim!r}; expected one of {TRIMS}")
        halvings = len(self.upsample_rates)
        if self.decoder_dim % 2**halvings:
            raise ValueError(
                f"Code2WavConfig: decoder_dim ({self.decoder_dim}) is halved by each of the {halvings} upsample_rates; "
                f"it must be a multiple of {2**halvings}"
            )

    @property
    def samples_per_frame(self) -> int:
        """1920 at public size: 80 ms at 24 kHz."""
        return math.prod(self.upsampling_ratios) * math.prod(self.upsample_rates)

    def samples(self, frames: int) -> int:
        """Samples that `frames` frames give: frames * samples_per_frame, less what the public trim cuts."""
        n = frames * math.prod(self.upsampling_ratios)
        for rate in self.upsample_rates:
            n = n * rate - (rate if self.trim == "public" else 0)
        return max(n, 0)


@dataclass(frozen=True, kw_only=True)
class CodecConfig(TransformerConfig):
    """Sizes of the codec. Latents are as wide as the decoder's frames, D = decoder.d_model, and the decoder also says
    how many codes there are and of how many values. The encoder's transformer: see `TransformerConfig`.

    Attributes:
        mel_bands: 0: the encoder reads samples. Otherwise a log-mel spectrogram of that many bands, with a hop of
            prod(downsample_rates) samples and a window of four hops
        encoder_dim: without mel_bands, channels behind the first convolution; doubled by each of
        downsample_rates: the encoder's downsamplings from samples, `decoder.upsample_rates` in reverse
        downsampling_ratios: its last downsamplings, at width D, `decoder.upsampling_ratios` in reverse, each behind
        blocks: as many ConvNeXt blocks
        codebook_dim: width in which vectors are compared with the codebooks
        decay: of the codebooks' moving averages, per update
        revive_below: a code whose average use falls below this part of the mean use is replaced
        dropout: share of the training samples that are decoded from a random number of codebooks
        unquantized: share of them that are decoded from latents that nothing rounded
        kmeans_steps: of the codebooks' initialisation on the first batch
    """

    mel_bands: int = 0
    encoder_dim: int = 64
    downsample_rates: tuple[int, ...] = (3, 4, 5, 8)
    downsampling_ratios: tuple[int, ...] = (2, 2)
    blocks: int = 1
    codebook_dim: int = 256
    decay: float = 0.99
    revive_below: float = 0.1
    dropout: float = 0.5
    unquantized: float = 0.0
    kmeans_steps: int = 10
    decoder: Code2WavConfig = field(default_factory=lambda: Code2WavConfig(trim="causal"))

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = ("decay", "revive_below", "dropout", "unquantized")
        self._check(self.decoder.d_model, may_be_zero=("mel_bands", "kmeans_steps", *shares))
        for name in shares:
            if getattr(self, name) > 1:
                raise ValueError(f"CodecConfig: {name} is {getattr(self, name)}; it must lie within 0..1")
        if self.samples_per_frame != self.decoder.samples_per_frame:
            raise ValueError(
                f"CodecConfig: downsample_rates {self.downsample_rates} and downsampling_ratios "
                f"{self.downsampling_ratios} make frames of {self.samples_per_frame} samples, the decoder of "
                f"{self.decoder.samples_per_frame}"
            )
        if (quantizers := self.decoder.quantizers) < 2:
            raise ValueError(f"CodecConfig: decoder.quantizers is {quantizers}; one semantic and one more at least")

    @property
    def samples_per_frame(self) -> int:
        return math.prod(self.downsample_rates) * math.prod(self.downsampling_ratios)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(_Sizes):
    """Sizes of the codec's discriminators.

    Attributes:
        periods: of the period discriminators, in samples. Primes, so that their folds overlap as little as possible.
        period_width: channels after the first convolution of a period discriminator; doubled by each, up to 16 times.
        stft_windows: of the STFT discriminators, in samples; the hop is a quarter.
        stft_width: channels of an STFT discriminator.
    """

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_width: int = 32
    stft_windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    stft_width: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.periods and not self.stft_windows:
            raise ValueError("discriminator.periods and discriminator.stft_windows are empty: nothing discriminates")


# ------------------------------------------------------------------------------------------------------ the whole model


@dataclass(frozen=True, kw_only=True)
class OmniConfig:
    """Sizes of an `OmniModel`.

    Attributes:
        thinker, aut, vision: sizes of the parts
        special_tokens: id of each special token by its name in the tokenizer. The model does not read them (what stands
            where is data, `token_types`); they leave with its weights, so that other programs can.
        position_id_per_seconds: TM-RoPE ids per second of sound or video
        talker, code2wav: of the parts that speak, None in a model that only writes
    """

    thinker: ThinkerConfig
    aut: AuTConfig
    vision: VisionConfig
    special_tokens: dict[str, int] = field(default_factory=lambda: dict(PUBLIC_SPECIAL_TOKENS))
    position_id_per_seconds: int = 13
    talker: TalkerConfig | None = None
    code2wav: Code2WavConfig | None = None

    def __post_init__(self) -> None:
        _must_be_equal(self, "aut.out_dim", "thinker.d_model")
        _must_be_equal(self, "vision.out_dim", "thinker.d_model")
        if len(self.vision.deepstack_layers) > self.thinker.layers:
            raise ValueError(
                f"vision.deepstack_layers has {len(self.vision.deepstack_layers)} levels for "
                f"{self.thinker.layers} decoder layers"
            )
        if self.talker is not None:
            _must_be_equal(self, "talker.thinker_dim", "thinker.d_model")
            _must_be_equal(self, "talker.accept_hidden_layer", "thinker.accept_hidden_layer")
        if self.talker is not None and self.code2wav is not None:
            _must_be_equal(self, "code2wav.quantizers", "talker.codebooks")
            _must_be_equal(self, "code2wav.codebook_size", "talker.codebook_size")


# ------------------------------------------------------------------------------------------------------------- presets

PRESETS: dict[str, OmniConfig] = {
    # Minutes on two CPU cores: 8.9 M parameters; of the Thinker's 6.5 M, 3.2 M work on a token.
    "tiny": OmniConfig(
        thinker=ThinkerConfig(
            vocab_size=4096, d_model=192, layers=5, heads=6, kv_heads=2, head_dim=32, ffn=512,
            n_experts=8, top_k=2, expert_width=192, accept_hidden_layer=2,
            mrope_sections=(6, 5, 5), rope_theta=10000.0, max_positions=8192,
        ),
        aut=AuTConfig(d_model=128, layers=2, heads=4, ffn=512, out_dim=192, conv_hidden=32),
        vision=VisionConfig(
            d_model=128, layers=3, heads=4, ffn=512, out_dim=192, grid_side=16, deepstack_layers=(0, 1)
        ),
    ),
    # One GPU, or a patient CPU.
    "small": OmniConfig(
        thinker=ThinkerConfig(
            vocab_size=4096, d_model=512, layers=12, heads=8, kv_heads=2, head_dim=64, ffn=1536,
            n_experts=32, top_k=4, expert_width=256, accept_hidden_layer=6,
            mrope_sections=(12, 10, 10), max_positions=32768,
        ),
        aut=AuTConfig(d_model=384, layers=6, heads=6, ffn=1536, out_dim=512, conv_hidden=96),
        vision=VisionConfig(
            d_model=384, layers=8, heads=6, ffn=1536, out_dim=512, grid_side=32, deepstack_layers=(2, 4, 6)
        ),
    ),
    # The public checkpoint's shapes.
    "qwen3_omni_30b_a3b": OmniConfig(
        thinker=ThinkerConfig(
            vocab_size=152064, d_model=2048, layers=48, heads=32, kv_heads=4, head_dim=128, ffn=768,
            n_experts=128, top_k=8, expert_width=768, accept_hidden_layer=24,
        ),
        aut=AuTConfig(),
        vision=VisionConfig(),
    ),
}  # fmt: skip

SPEECH_PRESETS: dict[str, tuple[TalkerConfig, Code2WavConfig]] = {
    # 3.6 M (1.2 M of them MTP) and 1.8 M parameters.
    "tiny": (
        TalkerConfig(
            d_model=192, layers=4, heads=6, kv_heads=2, head_dim=32,
            n_experts=4, top_k=2, expert_width=96, shared_expert_width=192,
            mrope_sections=(6, 5, 5), rope_theta=10000.0, max_positions=8192,
            thinker_dim=192, projection_width=192, accept_hidden_layer=2, codebooks=8, **codec_vocabulary(256),
            mtp=MTPConfig(
                d_model=192, layers=2, heads=6, kv_heads=2, head_dim=32, ffn=256, codebooks=8, codebook_size=256,
                rope_theta=10000.0,
            ),
        ),
        Code2WavConfig(
            quantizers=8, codebook_size=256, d_model=128, layers=2, heads=4, kv_heads=4, ffn=384, window=36,
            decoder_dim=192, trim="causal",
        ),
    ),
    # The codes are those of the public checkpoint (and of the first 16 codebooks of Mimi).
    "small": (
        TalkerConfig(
            d_model=512, layers=8, heads=8, kv_heads=2, head_dim=64,
            n_experts=16, top_k=4, expert_width=256, shared_expert_width=512,
            mrope_sections=(12, 10, 10), max_positions=32768,
            thinker_dim=512, projection_width=512, accept_hidden_layer=6,
            mtp=MTPConfig(d_model=512, layers=4, heads=8, kv_heads=4, head_dim=64, ffn=1536),
        ),
        Code2WavConfig(d_model=512, layers=4, heads=8, kv_heads=8, ffn=1536, decoder_dim=768, trim="causal"),
    ),
    "qwen3_omni_30b_a3b": (TalkerConfig(), Code2WavConfig()),
}  # fmt: skip

CODEC_PRESETS: dict[str, CodecConfig] = {
    # The decoders are the Code2Wav of the same preset. A spectrogram and a share of latents that nothing
    # rounds let a codec learn from few recordings in few steps (docs/speech.md).
    "tiny": CodecConfig(
        mel_bands=100, downsample_rates=(240,), downsampling_ratios=(2, 2, 2), blocks=2, layers=2, heads=4, kv_heads=4,
        ffn=384, window=36, codebook_dim=8, unquantized=0.5, decoder=SPEECH_PRESETS["tiny"][1],
    ),
    "small": CodecConfig(
        encoder_dim=32, layers=4, heads=8, kv_heads=8, ffn=1536, codebook_dim=128, decoder=SPEECH_PRESETS["small"][1]
    ),
    "qwen3_omni_30b_a3b": CodecConfig(),
}  # fmt: skip

AUT_PRESETS: dict[str, AuTModelConfig] = {
    # Minutes on two CPU cores: 2.1 M parameters with a vocabulary of 2,048, 0.9 M of them the encoder's.
    "tiny": AuTModelConfig(
        encoder=AuTConfig(d_model=128, layers=4, heads=4, ffn=512, out_dim=192, conv_hidden=32),
        decoder=AuTDecoderConfig(d_model=128, layers=3, heads=4, ffn=512, vocab_size=2048),
        ctc_slots=4,
    ),
    # The encoders of the published Qwen3-ASR models, 180 M and 300 M (arXiv 2601.21337), and of Qwen3-Omni, 650 M.
    "180m": AuTModelConfig(
        encoder=AuTConfig(d_model=896, layers=18, heads=14, ffn=3584, out_dim=1024),
        decoder=AuTDecoderConfig(d_model=896, layers=6, heads=14, ffn=3584),
    ),
    "300m": AuTModelConfig(
        encoder=AuTConfig(d_model=1024, layers=24, heads=16, ffn=4096, out_dim=2048),
        decoder=AuTDecoderConfig(d_model=1024, layers=6, heads=16, ffn=4096),
    ),
    "650m": AuTModelConfig(),
}  # fmt: skip
