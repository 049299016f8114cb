"""The original Qwen (v1) as a transformers model: same tensors, same numbers, no remote code.

What it does beyond a Llama: c_attn holds q, k and v and has a bias, SiLU is on w2, and positions beyond the training
length stretch the rotary base (dynamic NTK) and sharpen the queries (LogN). The state of NTK belongs to a sequence (its
cache), not to the module, so that two generations on one model do not disturb one another. docs/qwen.md says what was
changed on purpose; positions.py has the formulas, chat.py the conversation.
"""

# ruff: noqa: RUF012 - transformers declares these lists as attributes of the instance
from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.generation.logits_process import LogitsProcessorList
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from qquant.errors import UsageError
from qquant.kv_cache_quant import enable_as_configured
from qquant.models.qwen import positions
from qquant.models.qwen.chat import QWenChat, TokenlessIds
from qquant.models.qwen.configuration import QWenConfig
from qquant.models.qwen.layers import QWenMLP, QWenRMSNorm, QWenRotaryEmbedding, eager_attention, output_projection
from qquant.models.qwen.tokenization import register_tokenizer

_log = logging.getLogger("qquant")

_CONFIG_OPTIONS = {
    "bf16", "fp16", "fp32",
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
}  # fmt: skip
"""Options of ``from_pretrained`` that decide which config.json is read, and which dtype it names."""
_USED_IDS = 151851
"""Ids that the published vocabulary uses; ``wte`` and ``lm_head`` are padded to one of these numbers of rows:"""
_PADDED_ROWS = (151936, 152064)


class QWenAttention(nn.Module):
    """Self-attention with q, k and v in one projection."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = True
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.c_proj = output_projection(config.hidden_size, config)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor, Tensor | None],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L, hidden] -> the same, and the weights where eager attention is asked for."""
        batch, length, width = hidden_states.shape
        cos, sin, sharpness = position_embeddings
        projected = self.c_attn(hidden_states)
        # Queries and keys are neighbours, and turn alike: [B, L, 2 H, D].
        turned = positions.rotate(projected[..., : 2 * width].view(batch, length, -1, self.head_dim), cos, sin)
        query, key = turned.transpose(1, 2).chunk(2, dim=1)
        value = projected[..., 2 * width :].view(batch, length, -1, self.head_dim).transpose(1, 2)
        if sharpness is not None:
            query = query * sharpness.transpose(1, 2).to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        found, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attn_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.c_proj(found.reshape(batch, length, -1).contiguous()), weights


class QWenBlock(GradientCheckpointingLayer):
    """h = x + attn(ln_1(x)); h + mlp(ln_2(h))."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[B, L, hidden]."""
        found, _ = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = hidden_states + found
        result: Tensor = hidden_states + self.mlp(self.ln_2(hidden_states))
        return result


class QWenPreTrainedModel(PreTrainedModel):
    """What the models of this type have in common."""

    config: QWenConfig
    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": QWenBlock, "attentions": QWenAttention}
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"attn\.masked_bias$"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any = None, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As in transformers; ``bf16``, ``fp16`` and ``fp32`` choose the dtype where ``dtype`` does not.

        ``use_cache_quantization`` and ``use_cache_kernel``, here or in config.json, put ``generate`` on the int8 cache.
        """
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            named = config
            if not isinstance(config, QWenConfig):
                told = {key: kwargs[key] for key in _CONFIG_OPTIONS & kwargs.keys()}
                named = QWenConfig.from_pretrained(pretrained_model_name_or_path if config is None else config, **told)
            if named.precision is not None:
                kwargs["dtype"] = named.precision
        kwargs.pop("trust_remote_code", None)  # the one thing it would do here is to run a folder's own generate
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(model, QWenLMHeadModel):
            enable_as_configured(model)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, nn.Linear) and hasattr(module, "adds_to_residual"):
            spread = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=spread)
        elif isinstance(module, QWenRotaryEmbedding):
            config = self.config
            init.copy_(module.inv_freq, positions.inverse_frequencies(config.rotary_emb_base, config.rotary_dim))


class QWenModel(QWenPreTrainedModel):
    """Embedding, blocks and last norm, under the names of the published checkpoints."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.h = nn.ModuleList([QWenBlock(config, index) for index in range(config.num_hidden_layers)])
        self.ln_f = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.rotary_emb = QWenRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.wte = value  # type: ignore[assignment]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As transformers' decoders. Positions not given are counted from each row's first token that is no padding.

        Args:
            input_ids: [B, L] int64; or inputs_embeds [B, L, hidden].
            attention_mask: [B, total], 0 where a token is padding, or a mask that transformers prepared.
            position_ids: [B or 1, L] or [L] int64.
            past_key_values: any transformers cache; it also keeps the state of NTK.
            inputs_embeds: instead of input_ids.
            use_cache: whether a cache is made and returned.
            **kwargs: passed on to the attention.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("the model takes input_ids or inputs_embeds, exactly one of them; give one")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        length = inputs_embeds.shape[1]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        padding = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
        if position_ids is None:
            counted = torch.arange(length, device=inputs_embeds.device)[None] + past
            position_ids = counted if padding is None else positions.from_mask(padding, length)
        position_ids = position_ids[None] if position_ids.dim() == 1 else position_ids
        if kwargs.get("cu_seq_lens_q") is not None:
            inv_freq, longest = None, self._longest_packed(kwargs["max_length_k"])
        else:
            inv_freq = self._frequencies(padding, inputs_embeds, past_key_values, past)
            longest = past + length
            if past_key_values is not None and isinstance(past, Tensor):  # a static cache's count; its room is known
                longest = past_key_values.get_max_length()
        sharpen = self.config.use_logn_attn and not self.training and longest > self.config.seq_length
        hidden_states = self.drop(inputs_embeds)
        shared = {
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            ),
            "position_embeddings": self.rotary_emb(position_ids, inv_freq, sharpen),
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }
        for block in self.h:
            hidden_states = block(hidden_states, **shared, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )

    def _longest_packed(self, lengths: int | dict[str, int]) -> int:
        """Tokens, cached ones included, of the longest sequence that continuous batching packed into a row.

        Raises:
            UsageError: it is longer than NTK leaves alone; what its prompt was stretched by is kept nowhere.
        """
        longest = max(lengths.values()) if isinstance(lengths, dict) else lengths
        if self.config.use_dynamic_ntk and not self.training and longest > self.config.seq_length:
            raise UsageError(
                f"under dynamic NTK continuous batching takes sequences of up to seq_length ({self.config.seq_length}) "
                f"tokens, got {longest}; use generate, or set config.use_dynamic_ntk to False"
            )
        return longest

    def _frequencies(
        self, padding: Tensor | None, embeds: Tensor, cache: Cache | None, past: int | Tensor
    ) -> Tensor | None:
        """The rotary frequencies [B or 1, R / 2] of these sequences, None for those that nothing stretched.

        They follow from the length of the prompt when it goes in, and stay for what follows it.
        """
        if self.training or not self.config.use_dynamic_ntk:
            return None
        batch, length = embeds.shape[:2]
        state = positions.ntk_state(cache)
        first = (
            past == 0
            if isinstance(past, int)
            else state is None or (positions.may_look(past, length) and int(past) == 0)
        )
        if state is None or (first and not state.planned):
            seen = length if first else int(past)
            state = positions.NtkState(self._prompt_frequencies(padding, seen, embeds.device), planned=False)
        state.planned = False
        if cache is not None:
            positions.keep_ntk_state(cache, state)
        return None if state.inv_freq is None else positions.rows_of(state.inv_freq, batch)

    def _prompt_frequencies(self, padding: Tensor | None, length: int, device: torch.device) -> Tensor | None:
        """What prompts of ``length``, some of it padding, are rotated with."""
        if length <= self.config.seq_length:
            return None
        lengths = torch.tensor([length], device=device) if padding is None else (padding[:, :length] != 0).sum(1)
        return self.rotary_emb.stretched(lengths)


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin, QWenChat):
    """Qwen v1 with its output projection, and its conversation (chat.py)."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # which transformers would guess from a class's name
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.used_ids = _USED_IDS if config.vocab_size in _PADDED_ROWS else config.vocab_size
        """Ids below this may be generated; whoever adds tokens in the padded rows raises it."""
        if config.use_flash_attn is True and "flash" not in str(config._attn_implementation):
            _log.info("use_flash_attn is not used; attn_implementation=%r chooses", config._attn_implementation)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, L, vocab] of the tokens kept; the loss where labels are given. Arguments as of ``QWenModel``."""
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # On a CPU torch copies the weight once for every sequence of a strided input.
        logits = self.lm_head(outputs.last_hidden_state[:, keep].contiguous())
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate(self, inputs: Tensor | None = None, *args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:
        """As in transformers; ids that no token has, rows of ``lm_head`` that only pad it, are never chosen."""
        unused = list(range(self.used_ids, self.config.vocab_size))
        if unused:
            masking = TokenlessIds(unused, device=str(self.device))
            logits_processor = LogitsProcessorList([*(logits_processor or []), masking])
        return super().generate(inputs, *args, logits_processor=logits_processor, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers; the whole prompt decides NTK's stretch, also where it goes in chunk by chunk."""
        ordinary: Any = super()
        result = ordinary._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        # A mask of ones only is None by now; the positions are there always.
        whole = model_kwargs["position_ids"] if mask is None else mask
        if cache is not None and int(cache.get_seq_length()) == 0:
            self.plan_prompt(cache, whole.shape[-1], mask)
        return result

    def plan_prompt(self, cache: Cache, length: int, attention_mask: Tensor | None = None) -> None:
        """Tell an empty cache how long the prompt is that will go in call by call; ``generate`` does so by itself.

        The first call would otherwise be taken for the whole prompt, and NTK stretched for that.

        Args:
            cache: any transformers cache; it keeps what is planned.
            length: tokens per row, padding included.
            attention_mask: [B, length], 0 where a token is padding; None: nowhere.
        """
        padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        inv_freq = self.transformer._prompt_frequencies(padding, length, self.device)
        positions.keep_ntk_state(cache, positions.NtkState(inv_freq, planned=True))


def register_qwen() -> None:
    """Teach transformers' Auto classes the type ``qwen``: these classes, whatever ``auto_map`` says. Idempotent."""
    AutoConfig.register("qwen", QWenConfig, exist_ok=True)
    AutoModel.register(QWenConfig, QWenModel, exist_ok=True)
    AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel, exist_ok=True)
    register_tokenizer()
