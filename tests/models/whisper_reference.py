"""A small AuT, and Whisper of `transformers` with the weights of its decoder."""

from __future__ import annotations

import math

import numpy as np
import torch

from omnitrain.data.batch import IGNORE, EncodedSample
from omnitrain.models.aut import AuTConfig, sinusoids
from omnitrain.models.aut_decoder import AuT, AuTDecoder
from omnitrain.models.sizes import AuTDecoderConfig, AuTModelConfig
from omnitrain.vocabulary import AUDIO, TEXT

VOCABULARY, POSITIONS = 61, 64


def small_aut(seed: int = 0, *, ctc_slots: int = 0) -> AuT:
    """Random everywhere: initial biases of 0 and norms of 1 would hide errors."""
    torch.manual_seed(seed)
    encoder = AuTConfig(d_model=32, layers=2, heads=4, ffn=48, out_dim=24, conv_hidden=8, n_mels=16, window_frames=200)
    decoder = AuTDecoderConfig(d_model=32, layers=3, heads=4, ffn=40, vocab_size=VOCABULARY)
    model = AuT(AuTModelConfig(encoder=encoder, decoder=decoder, ctc_slots=ctc_slots)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm.weight" in name else 0.0, std=0.4)
    torch.nn.init.normal_(model.output_embedding, std=0.2)  # quiet: the recording is to be heard beside the last token
    return model


def whisper_of(decoder: AuTDecoder):
    """A `WhisperForConditionalGeneration` whose decoder computes what `decoder` does, given the encoder's features: its
    embeddings are the scaled ones, its learnt positions the sinusoids."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    c = decoder.config
    reference = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=c.vocab_size, d_model=c.d_model, decoder_layers=c.layers, decoder_attention_heads=c.heads,
            decoder_ffn_dim=c.ffn, encoder_layers=1, encoder_attention_heads=1, encoder_ffn_dim=8, num_mel_bins=8,
            max_source_positions=8, max_target_positions=POSITIONS, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    weights = dict(decoder.state_dict())
    weights["embed_positions.weight"] = sinusoids(torch.arange(POSITIONS), c.d_model)
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"] * math.sqrt(c.d_model)
    reference.model.decoder.load_state_dict(weights)  # strict: the names are the same
    reference.proj_out.weight = torch.nn.Parameter(decoder.embed_tokens.weight.detach().clone())
    return reference


def placed(encoded: torch.Tensor) -> torch.Tensor:
    """A recording's features [T, D] as Whisper's encoder gives them: its positions go through the whole recording."""
    return encoded + sinusoids(torch.arange(len(encoded)), encoded.shape[1])


def spoken_sample(
    seed: int, *, frames: int, before: int, after: int, answer: int = 0, n_mels: int = 16
) -> EncodedSample:
    """`before` tokens, a recording, `after` tokens, and an `answer` of so many, which is to be predicted."""
    rng = np.random.default_rng(seed)
    n = int(frames // 100 * 13 + -(-(frames % 100) // 8))
    types = np.array([TEXT] * before + [AUDIO] * n + [TEXT] * (after + answer), dtype=np.uint8)
    ids = np.where(types == AUDIO, 3, rng.integers(4, VOCABULARY, len(types)))
    labels = np.full(len(types), IGNORE)
    if answer:
        labels[-answer - 1 : -1] = ids[-answer:]
    return EncodedSample(
        id=f"spoken/{seed}", source="spoken", task="asr", modality="audio", languages=("en",), input_ids=ids,
        labels=labels, token_types=types, position_ids=np.tile(np.arange(len(types), dtype=np.float32), (3, 1)),
        mel=(rng.standard_normal((frames, n_mels)).astype(np.float32),), target_bytes=answer,
    )  # fmt: skip
