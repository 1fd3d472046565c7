"""The whole configuration of a run as one tree of frozen dataclasses: the only place of defaults.

What a model or a data set is made of is configured by dataclasses that stand with them (`models.sizes`,
`data.settings`, `evaluation.settings`); they hang in this tree. docs/keys.md is made from it. Nothing here imports
torch, so that the command line answers at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from omnitrain.config.typed import Named
from omnitrain.data.sample import MODALITIES
from omnitrain.evaluation.settings import CodecEvaluation, HeldoutEvaluation, SpeechEvaluation, TranscriptEvaluation
from omnitrain.models.sizes import DiscriminatorConfig

PARTS: dict[str, str] = {
    "aut_adapter": r"^aut\.(ln_post|proj)",
    "aut": r"^aut\.",
    "visual_adapter": r"^visual\.merger",
    "visual": r"^visual\.",
    "embeddings": r"^thinker\.embed_tokens\.",
    "head": r"^thinker\.lm_head\.",
    "router": r"^thinker\..*\.router\.",
    "thinker": r"^thinker\.",
    "mtp": r"^talker\.mtp\.",
    "talker_router": r"^talker\..*\.router\.",
    "talker": r"^talker\.",
    "code2wav": r"^code2wav\.",
    "aut_decoder": r"^decoder\.",
    "ctc": r"^ctc\.",
}
"""Part -> pattern of the names of its parameters in an `OmniModel` or `AuT`; the first match wins. The adapters are
what stands between an encoder and the Thinker (report section 3: stage S1 trains them before the encoders).
`module.train` and `optim.lr_scale` use these names."""

THINKER_PARTS = tuple(PARTS)[:8]
"""The parts that writing text needs."""
TALKER_PARTS = ("mtp", "talker_router", "talker")
AUT_PARTS = ("aut_adapter", "aut", "aut_decoder", "ctc")
"""Those of an `AuT`; of the adapter to a Thinker it has the norm alone."""
CODEC_PARTS = ("encoder", "quantizer", "decoder")
"""Those of a `Codec`, by the names of its modules."""


def check_parts(names: Iterable[str], key: str, parts: Collection[str] = PARTS) -> None:
    """Raise ValueError, naming `key`, if one of `names` is no part."""
    for name in names:
        if name not in parts:
            raise ValueError(f"{key}: no part {name!r}; the parts are {', '.join(parts)}")


def _check_share(value: float, key: str) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{key}={value}: must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """``model=pretrained``: a folder in the public Qwen3-Omni format.

    Attributes:
        folder: with config.json and *.safetensors.
        speech: with Talker and Code2Wav, where the folder has them.
    """

    folder: str
    speech: bool = False


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The Thinker's loss.

    Attributes:
        balance_coefficient: weight of the experts' load-balancing loss; 0.001 is the public Thinker's. 0 turns it off.
        balance_pools_layers: True sums counts and probabilities over layers before multiplying them, as the public
            reference implementation does; False balances each layer by itself.
        modality_weights: weight of a target token by modality, e.g. {image: 2.0}; modalities not named weigh 1.
        chunk: positions per cross-entropy product; memory is chunk * vocabulary * 4 bytes.
    """

    balance_coefficient: float = 0.001
    balance_pools_layers: bool = False
    modality_weights: dict[str, float] = field(default_factory=dict)
    chunk: int = 1024

    def __post_init__(self) -> None:
        for name, weight in self.modality_weights.items():
            if name not in MODALITIES:
                raise ValueError(f"loss.modality_weights.{name}: no such modality; use one of {', '.join(MODALITIES)}")
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"loss.modality_weights.{name}={weight}: must be a finite number >= 0")


@dataclass(frozen=True, kw_only=True)
class TalkerLossConfig(LossConfig):
    """The Talker's loss.

    Attributes:
        residual: weight of the mean over the other codebooks' losses against codebook 0's.
        text: weight of a text token against a frame, where the Thinker is trained too.
    """

    residual: float = 1.0
    text: float = 1.0


@dataclass(frozen=True, kw_only=True)
class CodecLossConfig:
    """Weights of the codec's terms.

    Attributes:
        mel: multi-scale log-mel distance.
        waveform: L1 of samples.
        commitment: of the encoder to its codes.
        content: CTC of the spoken text from codebook 0, which makes it the semantic one (samples without text do not
            count).
        adversarial, features: generator's hinge loss and feature matching, from step `adversarial_after` on.
        balance: what both say is scaled in each step so that its gradient at the waveform is so many times that of the
            mel distance; null: by its weights alone, beside which the distance is many times as steep.
        adversarial_samples: how much of each row the discriminators hear, in samples, at a place drawn anew in each
            step (HiFi-GAN judges a third of a second); null: all of it.
        windows: STFT windows of the mel distance, in samples.
        n_mels: bands of each.
        mel_floor: amplitudes below it are alike to the mel distance: without one that is near speech, most of its
            gradient comes from what nobody hears. Speech of -23 LUFS lies around 0.01.
    """

    mel: float = 15.0
    waveform: float = 1.0
    commitment: float = 0.25
    content: float = 0.1
    adversarial: float = 1.0
    features: float = 2.0
    adversarial_after: int = 10_000
    balance: float | None = None
    adversarial_samples: int | None = None
    windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    n_mels: tuple[int, ...] = (160, 80, 40, 20, 10)
    mel_floor: float = 1e-5

    def __post_init__(self) -> None:
        if self.balance is not None and self.balance < 0:
            raise ValueError(f"module.loss.balance is {self.balance}; it must be null or at least 0")
        if self.mel_floor <= 0:
            raise ValueError(f"module.loss.mel_floor is {self.mel_floor}; it must be positive")
        if len(self.windows) != len(self.n_mels):
            raise ValueError(f"module.loss: {len(self.windows)} windows but {len(self.n_mels)} values of n_mels")
        if self.adversarial_samples is not None and self.adversarial_samples <= 0:
            raise ValueError(
                f"module.loss.adversarial_samples is {self.adversarial_samples}; it must be positive or null"
            )


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How ``predict`` writes.

    Attributes:
        max_new_tokens: of an answer.
        temperature: 0: the likeliest token.
    """

    max_new_tokens: int = 48
    temperature: float = 0.0


LORA_PARTS = ("aut", "visual", "thinker", "talker", "mtp")
LORA_TARGETS = ("attention", "mlp", "experts")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters beside frozen matrices (Hu et al. 2021, arXiv 2106.09685): W x + (alpha / rank) B A x.

    Attributes:
        rank: rows of A, columns of B.
        alpha: over rank the weight of the product; twice the rank is usual.
        dropout: share of x that A does not see. Of experts it must be 0: their product B A is added to W.
        parts: which learn so, of aut, visual, thinker, talker and mtp; all else of them is frozen.
        targets: which matrices of their layers: attention, mlp (dense, and the encoders' own) and experts (one A and B
            for each expert).
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    parts: list[str] = field(default_factory=lambda: ["thinker"])
    targets: list[str] = field(default_factory=lambda: ["attention", "mlp"])

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"module.lora.rank={self.rank}: must be at least 1")
        check_parts(self.parts, "module.lora.parts", LORA_PARTS)
        if wrong := [name for name in self.targets if name not in LORA_TARGETS]:
            raise ValueError(f"module.lora.targets: no target {wrong[0]!r}; the targets are {', '.join(LORA_TARGETS)}")
        _check_share(self.dropout, "module.lora.dropout")
        if self.dropout and "experts" in self.targets:
            raise ValueError(
                f"module.lora.dropout={self.dropout}: experts have none, since their product B A is added to their "
                "matrices; set it to 0, or leave experts out of module.lora.targets"
            )


@dataclass(frozen=True, kw_only=True)
class ThinkerModuleConfig:
    """``module=thinker``: the Thinker and its encoders learn to predict text.

    Attributes:
        train: parts that learn; leave one out to freeze it. null: all of them, or with `lora` none beside it.
        lora: train low-rank adapters, as in {rank: 16, parts: [thinker, aut]}; needs the extra `lora`.
        init_from: a run folder, or one in the public format, whose weights replace the fresh ones. Or such folders by
            part, as in {thinker: DIR, aut: DIR}; DIR of `thinker` may hold a text model (Qwen3ForCausalLM,
            Qwen3MoeForCausalLM), DIR of `aut` a Qwen3-ASR.
        aut_window_seconds: attention window of the audio encoder, drawn anew for each optimizer step from these bounds
            (whole seconds, inclusive; report section 3: 1 to 8 s). null: the encoder's own. Evaluation uses its own.
        word_dropout: share of the words of an answer about a picture or a sound that are hidden from the words after
            them in training (word dropout: Bowman et al. 2016, arXiv 1511.06349, section 3.1), so that the model looks
            and listens.
        seed: of the window draws; null: the run's.
        activation_checkpointing: parts whose activations are not kept for the backward pass but computed again, layer
            by layer (arXiv 1604.06174): less memory, about a third more time. Of aut, visual, thinker, talker, mtp and
            code2wav.
        kept_activations: what is kept all the same in these parts: attention (its outputs, as large as a layer's
            input), experts (their products, top_k times as large).
        compile: layers: those of Thinker, Talker, MTP, AuT's encoder and the vision encoder, and the loss, run in fused
            kernels (torch.compile) where something is learnt; the first steps then wait for the compiler. false: as
            they are written.
        loss: weights.
        generation: for `predict`.
    """

    ALL: ClassVar[tuple[str, ...]] = THINKER_PARTS
    LAYERED: ClassVar[tuple[str, ...]] = ("aut", "visual", "thinker", "talker", "mtp", "code2wav")

    train: list[str] | None = None
    lora: LoraConfig | None = None
    init_from: str | dict[str, str] | None = None
    aut_window_seconds: tuple[int, int] | None = (1, 8)
    word_dropout: float = 0.0
    seed: int | None = None
    activation_checkpointing: list[str] = field(default_factory=list)
    kept_activations: list[Literal["attention", "experts"]] = field(default_factory=list)
    compile: Literal[False, "layers"] = False
    loss: LossConfig = field(default_factory=LossConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def __post_init__(self) -> None:
        if self.train is None:
            object.__setattr__(self, "train", [] if self.lora else list(self.ALL))
        check_parts(self.whole_parts, "module.train")
        if both := [part for part in self.lora_parts if part in self.whole_parts]:
            raise ValueError(f"module.lora.parts has {both[0]}, which module.train trains as a whole; name it in one")
        check_parts(self.activation_checkpointing, "module.activation_checkpointing", self.LAYERED)
        if self.kept_activations and not self.activation_checkpointing:
            raise ValueError(
                "module.kept_activations says what is kept where activations are computed again, which they are in no "
                "part; name parts in module.activation_checkpointing, or remove it"
            )
        if self.compile and self.lora is not None and "experts" in self.lora.targets:
            raise ValueError(
                "module.compile=layers: peft makes adapters of experts anew in each pass, which cannot be compiled; "
                "leave experts out of module.lora.targets, or set module.compile=false"
            )
        _check_share(self.word_dropout, "module.word_dropout")

    @property
    def whole_parts(self) -> list[str]:
        """Parts of which every weight learns."""
        return list(self.train or ())

    @property
    def lora_parts(self) -> list[str]:
        """Parts that learn through low-rank adapters."""
        return [] if self.lora is None else list(self.lora.parts)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How answers are sampled in training: from the whole distribution, so that their probabilities are known.

    Attributes:
        max_new_tokens: of an answer.
        temperature: above 0; the policy that learns is the model at this temperature.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"module.rollout.max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"module.rollout.temperature={self.temperature}: must be a number above 0")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Who is learnt from: a folder, or a server.

    Attributes:
        folder: a run folder, or one in the public format, with the student's tokenizer and geometry of media.
        server: URL of a server that speaks the OpenAI protocol and tells top log-probabilities of a prompt (vLLM), as
            http://localhost:8000/v1; it reads text alone. Keys: docs/post_training.md.
        name: what the server calls the model.
        top_k: so many of the teacher's likeliest tokens are compared one by one, all others as one; null: the whole
            vocabulary, or of a server 20.
    """

    folder: str | None = None
    server: str | None = None
    name: str | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.folder is not None and self.server is not None:
            raise ValueError("module.teacher has a folder and a server; leave one of them null")
        if self.server is not None and self.name is None:
            raise ValueError("module.teacher.server needs module.teacher.name, what the server calls the model")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"module.teacher.top_k={self.top_k}: must be at least 1, or null")


@dataclass(frozen=True, kw_only=True)
class DistillModuleConfig(ThinkerModuleConfig):
    """``module=distill``: the Thinker and its encoders learn to be like a teacher (docs/post_training.md).

    Attributes:
        teacher: who is learnt from.
        on_policy: share of the steps in which the student writes the answers itself; in the others they are the data's.
        beta: of the generalised Jensen-Shannon divergence: 0 is the forward KL, 1 the reverse, 0.5 the usual one
            between.
        temperature: both distributions are flattened by it.
        rollout: how the student writes.
    """

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    on_policy: float = 0.5
    beta: float = 0.5
    temperature: float = 1.0
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("on_policy", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"module.{name}={getattr(self, name)}: must lie in [0, 1]")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"module.temperature={self.temperature}: must be a number above 0")


@dataclass(frozen=True, kw_only=True)
class GspoModuleConfig(ThinkerModuleConfig):
    """``module=gspo``: the Thinker and its encoders learn from rewards of the answers that they sample
    (docs/post_training.md).

    Attributes:
        rewards: by name, e.g. {wer: {_target_: omnitrain.tasks.rewards.ErrorRate, weight: 1.0}}; an answer is worth
            their weighted sum.
        answers: sampled to each prompt.
        rollout: how they are sampled.
        steps_per_rollout: optimizer steps whose answers are sampled with the same weights, those of the first.
        level: sequence: one ratio an answer (GSPO). token: one a token (GRPO).
        clip: ratios beyond 1 - the first or 1 + the second of these give no gradient. GSPO's are small, since its
            ratios are; of GRPO (0.2, 0.28) are usual.
        scale_advantages: divide by the standard deviation of a prompt's rewards.
        kl: weight of the KL divergence to the weights that training began with.
        truncate: largest weight of a token for what its probabilities in sampling and in training differ; null: no
            weights.
        routing_replay: each token goes to the experts that it went to in the sampling policy.
    """

    rewards: dict[str, Named | None] = field(default_factory=dict)
    answers: int = 8
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    steps_per_rollout: int = 4
    level: Literal["sequence", "token"] = "sequence"
    clip: tuple[float, float] = (3e-4, 4e-4)
    scale_advantages: bool = True
    kl: float = 0.0
    truncate: float | None = 2.0
    routing_replay: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answers < 2:
            raise ValueError(f"module.answers={self.answers}: must be at least 2, since they are compared")
        if self.steps_per_rollout < 1:
            raise ValueError(f"module.steps_per_rollout={self.steps_per_rollout}: must be at least 1")
        if min(self.clip) < 0 or self.clip[0] >= 1:
            raise ValueError(f"module.clip={list(self.clip)}: the first must lie in [0, 1), the second be at least 0")
        if self.kl < 0:
            raise ValueError(f"module.kl={self.kl}: must be at least 0")
        if self.truncate is not None and self.truncate < 1:
            raise ValueError(f"module.truncate={self.truncate}: must be at least 1, or null")
        if self.word_dropout:
            raise ValueError("module.word_dropout hides words of the data's answers, of which module=gspo reads none")


@dataclass(frozen=True, kw_only=True)
class TalkerModuleConfig(ThinkerModuleConfig):
    """``module=talker``: the Talker with MTP learns to say the answers' text (report section 4).

    Attributes:
        train: null: the Talker's. With a part of the Thinker among them (or in `lora`) the two are trained jointly, and
            gradients of speech reach the word embeddings and, at user media, the Thinker's lower layers.
        frame_dropout: share of the positions that do not see the codes of their frame in training, their word alone, on
            average (`training.talker.hide_frames`). A Talker that always sees true codes learns to continue sounds and
            hardly listens to the text; the smaller it is, the more has to be hidden.
        mtp_frames: share of a pack's frames, drawn anew in each step, of which MTP learns. MTP reads Q positions for
            each frame, most of a small Talker's work, and neighbouring frames teach it much the same (the "compute
            amortization" of Sesame's CSM, 2025).
        cached_thinker: the frozen Thinker is not run; its hidden states at media are read from the shards, where
            `omnitrain data encode` wrote them with its option --thinker (with the audio encoder's own window).
    """

    ALL: ClassVar[tuple[str, ...]] = TALKER_PARTS

    frame_dropout: float = 0.5
    mtp_frames: float = 1.0
    cached_thinker: bool = False
    loss: TalkerLossConfig = field(default_factory=TalkerLossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self.frame_dropout, "module.frame_dropout")
        if not 0 < self.mtp_frames <= 1:
            raise ValueError(f"module.mtp_frames={self.mtp_frames}: must lie in (0, 1]")
        learning = ", ".join(part for part in self.whole_parts + self.lora_parts if part in THINKER_PARTS)
        if self.cached_thinker and learning:
            raise ValueError(
                f"module.cached_thinker needs a frozen Thinker, but module.train has its parts {learning}: leave them "
                "out, or set module.cached_thinker=false"
            )


@dataclass(frozen=True, kw_only=True)
class TalkerDpoModuleConfig(TalkerModuleConfig):
    """``module=talker_dpo``: the Talker with MTP learns which of two takes of an answer is preferred (report section 4;
    docs/post_training.md).

    Attributes:
        beta: how dearly it costs to leave the Talker that training began with.
        chosen: weight of the preferred take's own nats a frame beside the preference (Pang et al. 2024, "Iterative
            reasoning preference optimization"); 0: a pair may also become unlike by both becoming unlikely.
        frame_dropout, mtp_frames: of the Talker's pretraining; what is compared here are whole takes, 0 and 1.
    """

    beta: float = 0.1
    chosen: float = 0.0
    frame_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, smallest in (("beta", 1e-9), ("chosen", 0.0)):
            if not (math.isfinite(value := getattr(self, name)) and value >= smallest):
                raise ValueError(f"module.{name}={value}: must be a number {'>= 0' if name == 'chosen' else 'above 0'}")
        if self.frame_dropout or self.mtp_frames != 1:
            raise ValueError(
                f"module.frame_dropout={self.frame_dropout}, module.mtp_frames={self.mtp_frames}: module=talker_dpo "
                "compares whole takes, leave them out"
            )


@dataclass(frozen=True, kw_only=True)
class AuTLossConfig(LossConfig):
    """AuT's loss.

    Attributes:
        ctc: weight of the CTC loss of transcripts from the encoder alone (Graves et al. 2006) against the decoder's;
            needs `model.ctc_slots`. 0: none.
    """

    ctc: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.ctc) and self.ctc >= 0):
            raise ValueError(f"module.loss.ctc={self.ctc}: must be a finite number >= 0")


@dataclass(frozen=True, kw_only=True)
class SpecAugmentConfig:
    """SpecAugment (Park et al. 2019, arXiv 1904.08779): stripes of a recording's mel frames are set to their mean.

    Attributes:
        time_stripes: of each recording; 0: none.
        time_width: widest of them, frames of 10 ms.
        time_share: of a recording, at most so much is hidden by one stripe.
        frequency_stripes: of each recording; 0: none.
        frequency_width: widest of them, mel bands.
    """

    time_stripes: int = 2
    time_width: int = 40
    time_share: float = 0.15
    frequency_stripes: int = 2
    frequency_width: int = 27

    def __post_init__(self) -> None:
        _check_share(self.time_share, "module.spec_augment.time_share")


@dataclass(frozen=True, kw_only=True)
class AuTGenerationConfig(GenerationConfig):
    """How ``predict`` writes transcripts.

    Attributes:
        max_new_tokens: of a transcript.
        beam: hypotheses of a beam search, which draws nothing at random; 1: none, one token after the other.
        length_penalty: of a beam search: log p / (number of tokens ^ length_penalty) counts; 0 prefers short texts.
        timestamps: when each word was said: by `ctc` (needs `model.ctc_slots`) or by cross-`attention`; `none`.
        ctc_weight: of CTC against the decoder in transcripts (needs `model.ctc_slots`): CTC proposes `beam` texts, or 8
            where that is 1, and weight * its log p + (1 - weight) * the decoder's chooses (`generation.rescore`); null:
            the decoder alone writes. Other answers, such as translations, are always the decoder's.
    """

    max_new_tokens: int = 256
    beam: int = 1
    length_penalty: float = 1.0
    ctc_weight: float | None = None
    timestamps: Literal["none", "ctc", "attention"] = "none"

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise ValueError(f"module.generation.beam={self.beam}: must be at least 1")
        if self.beam > 1 and self.temperature:
            raise ValueError("module.generation: a beam search draws nothing; leave temperature or beam alone")
        if self.ctc_weight is not None:
            _check_share(self.ctc_weight, "module.generation.ctc_weight")


@dataclass(frozen=True, kw_only=True)
class AuTModuleConfig(ThinkerModuleConfig):
    """``module=aut``: the audio encoder with its own decoder, from scratch (report section 2.2): transcription,
    translation and understanding of sounds, told apart by the prompt.

    Attributes:
        train: parts that learn, of aut_adapter (its norm), aut, aut_decoder and ctc; null: all.
        activation_checkpointing: of aut and decoder.
        spec_augment: of the mel frames, in training; null: none.
        validation_transcripts: so many samples of each validation are written down, greedily, for the error rates that
            are logged; 0: none.
        generation: for `predict`.
    """

    ALL: ClassVar[tuple[str, ...]] = AUT_PARTS
    LAYERED: ClassVar[tuple[str, ...]] = ("aut", "decoder")

    loss: AuTLossConfig = field(default_factory=AuTLossConfig)
    spec_augment: SpecAugmentConfig | None = field(default_factory=SpecAugmentConfig)
    validation_transcripts: int = 48
    generation: AuTGenerationConfig = field(default_factory=AuTGenerationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_parts(self.whole_parts, "module.train", AUT_PARTS)


@dataclass(frozen=True, kw_only=True)
class CodecModuleConfig:
    """``module=codec``: encoder, quantizer and Code2Wav learn from spectrograms, then also from discriminators.

    Attributes:
        train: parts that learn. Without encoder and quantizer a recording keeps its codes, and the codec its
            fingerprint: codes and Talkers made with the codec before stay of use.
        init_from: folder of a codec's run; its codec, discriminators and content head are where this one starts. Or
            builtin, or a folder of `convert to-codec`: its codec is. Or one in the public format: its Code2Wav is where
            the decoder starts.
        clip: largest gradient norm of the codec, and of the discriminators.
        activation_checkpointing: parts whose activations are computed again in the backward pass: encoder, decoder.
        compile: layers: the convolutional blocks of encoder and decoder run in fused kernels (torch.compile) where they
            learn; the first step waits minutes for the compiler. false: as they are written.
        loss: weights of the terms.
        discriminator: sizes of the discriminators.
    """

    train: list[str] = field(default_factory=lambda: list(CODEC_PARTS))
    init_from: str | None = None
    clip: float = 1.0
    activation_checkpointing: list[str] = field(default_factory=list)
    compile: Literal[False, "layers"] = False
    loss: CodecLossConfig = field(default_factory=CodecLossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        check_parts(self.activation_checkpointing, "module.activation_checkpointing", ("encoder", "decoder"))
        check_parts(self.train, "module.train", CODEC_PARTS)
        if not self.train:
            raise ValueError(f"module.train is empty: name one part at least of {', '.join(CODEC_PARTS)}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, or Muon beside it, and its learning rate by step.

    Attributes:
        lr: peak learning rate.
        lr_scale: factor on `lr` by part, e.g. {aut: 0.5, visual: 0.5}; parts not named have 1.
        betas, eps: of AdamW.
        weight_decay: decoupled; matrices only: norms, biases and other vectors are never decayed.
        schedule: wsd (warm-up, stable, linear decay over the last `decay_fraction` of the steps: arXiv 2404.06395; the
            stable phase can be continued later from its last checkpoint), cosine (arXiv 1608.03983) or constant, each
            after the warm-up.
        warmup_steps: optimizer steps of linear warm-up.
        decay_fraction: of the steps.
        min_lr_ratio: final learning rate over the peak.
        total_steps: length of the schedule in optimizer steps; null: trainer.max_steps.
        fused: one kernel for all parameters.
        states: of AdamW's two moments. int8: in 8 bits (Dettmers et al. 2021, arXiv 2110.02861; blocks of 256 numbers
            with a scale each; parameters of fewer than 4,096 numbers stay in 32): 2 bytes for each parameter instead of
            8. Needs the extra `low_bit`, and one process or copies (parallel=ddp).
        matrices: what moves matrices, convolutions and experts: adamw, or muon (`training.optim.Muon`), which needs
            fewer steps, and one process or copies (parallel=ddp). Vectors, embeddings and heads are AdamW's.
    """

    lr: float = 1e-3
    lr_scale: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = 50
    decay_fraction: float = 0.3
    min_lr_ratio: float = 0.05
    total_steps: int | None = None
    fused: bool = True
    states: Literal["float32", "int8"] = "float32"
    matrices: Literal["adamw", "muon"] = "adamw"

    def __post_init__(self) -> None:
        if self.matrices == "muon" and self.states != "float32":
            raise ValueError(f"optim.states={self.states} is AdamW's; with optim.matrices=muon set float32")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"optim.decay_fraction={self.decay_fraction}: must lie in [0, 1]")
        check_parts(self.lr_scale, "optim.lr_scale")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Lightning's Trainer; its documentation has more on each argument.

    Attributes:
        accelerator: cpu, gpu or auto.
        devices: how many, or which.
        num_nodes: machines.
        strategy: auto, ddp, or a strategy by name.
        precision: 32-true, bf16-mixed (most processors have no fast bf16), or auto: bf16-mixed on GPUs that have it,
            else 32-true.
        max_steps: optimizer steps; the data stream has no end.
        accumulate_grad_batches: batches of an optimizer step.
        gradient_clip_val: largest gradient norm, after the division by the target tokens; null: no bound.
        log_every_n_steps: rows of metrics.csv.
        val_check_interval: batches between two looks at the validation split.
        limit_train_batches, limit_val_batches, limit_test_batches, limit_predict_batches: batches (a whole number) or
            share (a fraction).
        num_sanity_val_steps: validation batches before training.
        use_distributed_sampler: false, since the data stream shards itself over ranks.
        detect_anomaly: autograd names the forward operation of a NaN; several times slower.
        profiler: by name.
        plugins: by name.
    """

    accelerator: str = "cpu"
    devices: int | str | list[int] = 1
    num_nodes: int = 1
    strategy: str | Named = "auto"
    precision: str = "32-true"
    max_steps: int = 1000
    max_epochs: int | None = -1
    max_time: str | None = None
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    log_every_n_steps: int = 1
    val_check_interval: int | float | None = 200
    check_val_every_n_epoch: int | None = None
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = 20
    limit_test_batches: int | float | None = None
    limit_predict_batches: int | float | None = None
    overfit_batches: int | float = 0.0
    num_sanity_val_steps: int = 0
    use_distributed_sampler: bool = False
    enable_model_summary: bool = False
    enable_progress_bar: bool | None = None
    detect_anomaly: bool = False
    deterministic: bool | str | None = None
    benchmark: bool | None = None
    sync_batchnorm: bool = False
    profiler: str | Named | None = None
    plugins: list[Any] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes of a run (trainer.devices * trainer.num_nodes) share the model; docs/scale.md.

    Attributes:
        engine: ddp: each has a copy of it. fsdp: they share copies, as the sizes say.
        data: copies; auto: what `shard` and `context` leave.
        shard: processes that share a copy and read data of their own; auto: what `data` and `context` leave. With both
            auto there is one copy.
        expert: processes that share the experts of a layer; auto: as many as the experts allow, of those of a node that
            share a copy.
        context: processes that share each pack.
        offload: shards wait in the host's memory, and the optimizer runs there.
        timeout_seconds: so long a process waits for the others; then all end, and the one that is missing is named.
    """

    engine: str = "ddp"
    data: int | str = "auto"
    shard: int | str = "auto"
    expert: int | str = 1
    context: int = 1
    offload: bool = False
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.engine not in ("ddp", "fsdp"):
            raise ValueError(f"parallel.engine={self.engine}: must be ddp or fsdp")
        if not (math.isfinite(self.timeout_seconds) and self.timeout_seconds > 0):
            raise ValueError(f"parallel.timeout_seconds={self.timeout_seconds}: must be a number of seconds above 0")
        for name in ("data", "shard", "expert"):
            if not isinstance(value := getattr(self, name), int) and value != "auto":
                raise ValueError(f"parallel.{name}={value}: must be a number of processes, or auto")
        if self.engine == "ddp" and any(
            getattr(self, f.name) != f.default for f in fields(self) if f.name not in ("engine", "timeout_seconds")
        ):
            raise ValueError("parallel.engine=ddp copies the whole model and shares nothing; set parallel=fsdp")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """``checkpoints/last.ckpt``: the whole state, all or nothing, also on SIGTERM and Ctrl-C; a file, or of processes
    that share the model a folder.

    Attributes:
        every_n_steps: optimizer steps between checkpoints.
        keep_every_n_steps: also keep step=N.ckpt at multiples of this; null: only the last.
    """

    every_n_steps: int = 100
    keep_every_n_steps: int | None = None

    def __post_init__(self) -> None:
        if self.every_n_steps < 1:
            raise ValueError(f"callbacks.checkpoint.every_n_steps={self.every_n_steps}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SpikeGuardConfig:
    """Skips a step with a NaN, or with a gradient far above the usual ones.

    Attributes:
        factor: a step is skipped if its gradient norm is above `factor` times the median of
        window: the last so many accepted steps, from the
        min_steps: -th accepted step on.
        max_in_a_row: so many skipped steps in a row end the run.
    """

    factor: float = 10.0
    window: int = 200
    min_steps: int = 20
    max_in_a_row: int = 5


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """Tokens/s, MFU, waiting for data and for other ranks, and memory, in throughput.csv.

    Attributes:
        peak_tflops: what MFU is measured against, per device; null: see `training.flops.peak_flops`.
    """

    peak_tflops: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunRecordConfig:
    """environment.json and data.json. It has nothing to configure."""


@dataclass(frozen=True, kw_only=True)
class ProgressConfig:
    """One line that says what is happening.

    Attributes:
        plain_every_n_seconds: time between the lines when there is no terminal.
    """

    plain_every_n_seconds: float = 20.0


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """Ends a run whose processes wait in vain for one of them, which it names; after `parallel.timeout_seconds`."""


@dataclass(frozen=True, kw_only=True)
class MediaPanelsConfig:
    """With logger=wandb: pictures, spectrograms, players and answers after each validation.

    Attributes:
        samples_per_modality: shown.
        max_new_tokens: of their answers.
    """

    samples_per_modality: int = 3
    max_new_tokens: int = 48


@dataclass(frozen=True, kw_only=True)
class CsvLoggerConfig:
    """metrics.csv and throughput.csv: resume and report need them. It has nothing to configure."""


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """``logger=wandb``: Weights & Biases, beside the CSV.

    Attributes:
        project, name, entity, group, tags: as there; null of `name`: the run's name.
        offline: without a network; later `wandb sync RUN_DIR/wandb/...`.
        log_model: upload checkpoints.
    """

    project: str = "omnitrain"
    name: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] | None = None
    offline: bool = False
    log_model: bool = False


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """Folders.

    Attributes:
        run_dir: everything a run writes lands here: config.yaml, metrics.csv, checkpoints/, eval/, report.html.
        data_dir: where data_prep writes and recipes look for prepared data.
        study_dir: runs of a study (recipe nondegradation): MATCH/ARM/seed=N.
    """

    run_dir: str = "runs/${now:%Y-%m-%d_%H-%M-%S}"
    data_dir: str = "data"
    study_dir: str = "runs/nondegradation"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run.

    Attributes:
        name: what it is called in reports and loggers.
        seed: of weights, data order and dropout.
        ckpt_path: null: start anew. last: continue the run in paths.run_dir, or start it if the folder is empty, so
            that a scheduler can call the same line again and again. A file, or a run's folder: start from there.
        codec: the codec that a Talker speaks through: builtin, a codec's run folder, a folder of `convert to-codec`, or
            that of a Mimi. The model's codebooks and Code2Wav follow it, where they are not given.
        codes: folder of shards with its frames (`omnitrain data encode`).
        model, data, module, optim, trainer, parallel, callbacks, logger, evaluation, paths: one option of each group.
        eval: benchmarks, for the verb test (docs/benchmarks.md).
        stages: of a recipe of several commands: [{name: NAME, command: [VERB, ARGUMENT, ...]}, ...].
        stage_overrides: more arguments for a stage: 'stage_overrides.NAME=[trainer.max_steps=50]'.
        study: the recipe's study (docs/nondegradation.md), of which
        arm, match: name one run.
        variables: keys that only a recipe itself reads.
    """

    name: str = "run"
    seed: int = 0
    ckpt_path: str | None = None
    codec: str | None = None
    codes: str | None = None
    model: Named
    data: Named
    module: Named
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    callbacks: dict[str, Named | None] = field(default_factory=dict)
    logger: dict[str, Named | None] = field(default_factory=dict)
    evaluation: HeldoutEvaluation | TranscriptEvaluation | CodecEvaluation | SpeechEvaluation = field(
        default_factory=HeldoutEvaluation
    )
    paths: PathsConfig = field(default_factory=PathsConfig)
    eval: dict[str, Any] | None = None
    stages: list[Any] | None = None
    stage_overrides: dict[str, Any] = field(default_factory=dict)
    study: dict[str, Any] | None = None
    arm: str | None = None
    match: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
