"""Qwen-VL (Bai et al. 2023b): the Qwen-7B language model (Bai et al. 2023a), which reads a picture as a span of 256
features.

Shapes: B batch, T query length, S key length, N heads, H head dim, D model dim, F feed-forward dim, V vocabulary, L
layers, I images, Q resampler queries. The model is a plain pytree: pass it through jax.jit, jax.grad and jax.lax.scan
as it is. Text, tokenisation and picture files are the processor's business; sampling is inference's.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwenvl_jax.config import QwenVLConfig, VisionConfig
from qwenvl_jax.models.resampler import Resampler
from qwenvl_jax.models.vit import Vit
from qwenvl_jax.nn import cache as kv_cache
from qwenvl_jax.nn.attention import PackedBlocks, attend, attend_packed
from qwenvl_jax.nn.continued_attention import Continued, attend_continued
from qwenvl_jax.nn.linear import Embedding, Linear
from qwenvl_jax.nn.norm import LayerNorm, RMSNorm
from qwenvl_jax.nn.rope import inverse_frequencies, logn_scale, ntk_alpha, rotary_table, rotate
from qwenvl_jax.nn.row_attention import PackedRows, attend_rows
from qwenvl_jax.sharding import along_batch

Remat = Literal["none", "layers", "products"]

# What the forward pass of a layer keeps for the backward one: everything, nothing but its input, or its products with
# weights (attention scores are computed again). The first needs most memory, the second most time.
REMAT_POLICIES = {
    "layers": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Context(NamedTuple):
    """What attention needs to know about a batch of tokens besides the tokens; the same for every layer."""

    # bool [B, T, S], True where a query may look, or what says the same of packed rows and of tokens after a past
    mask: jax.Array | PackedBlocks | PackedRows | Continued
    cos: jax.Array  # float32 [B, T, rotary_dim / 2]
    sin: jax.Array
    query_scale: jax.Array | None  # float32 [B, T], logn attention; None in training
    cache_slot: jax.Array | None = None  # int [], the recent slot of the cache where the first new token goes


class Block(nnx.Module):
    """One decoder layer: attention and gated MLP, each after an RMSNorm and added to the residual stream."""

    def __init__(self, config: QwenVLConfig, *, dtype, rngs: nnx.Rngs):
        dim, std = config.hidden_size, config.initializer_range
        residual_std = std / (2 * config.num_hidden_layers) ** 0.5
        self.heads = config.num_attention_heads
        self.norm_attention = RMSNorm(dim, epsilon=config.layer_norm_epsilon, dtype=dtype)
        self.qkv = Linear(dim, (3, dim), axes=("embed", None, "heads"), bias=True, std=std, dtype=dtype, rngs=rngs)
        self.out = Linear(dim, dim, axes=("heads", "embed"), std=residual_std, dtype=dtype, rngs=rngs)
        self.norm_mlp = RMSNorm(dim, epsilon=config.layer_norm_epsilon, dtype=dtype)
        self.up = Linear(dim, config.mlp_width, axes=("embed", "mlp"), std=std, dtype=dtype, rngs=rngs)
        self.gate = Linear(dim, config.mlp_width, axes=("embed", "mlp"), std=std, dtype=dtype, rngs=rngs)
        self.down = Linear(config.mlp_width, dim, axes=("mlp", "embed"), std=residual_std, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, context: Context, cache: kv_cache.LayerCache | None = None
    ) -> tuple[jax.Array, kv_cache.LayerCache | tuple[jax.Array, jax.Array]]:
        """x [B, T, D] -> ([B, T, D], keys and values).

        Without a cache, attention is among the T tokens and their (k, v), [B, T, N, H] each, are returned. With one,
        they are stored at `context.cache_slot`, attention is over the whole cache, and the filled cache is returned;
        tokens that are `Continued` only read its past, and are returned as (k, v), too.
        """
        qkv = self.qkv(self.norm_attention(x))  # [B, T, 3, D]
        q, k, v = (part.reshape(*x.shape[:2], self.heads, -1) for part in jax.lax.split(qkv, (1, 1, 1), 2))
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        if context.query_scale is not None:
            q = q * context.query_scale[..., None, None].astype(q.dtype)
        kept: kv_cache.LayerCache | tuple[jax.Array, jax.Array] = (k, v)
        if isinstance(context.mask, PackedBlocks):
            mixed = attend_packed(q, k, v, context.mask)
        elif isinstance(context.mask, PackedRows):
            mixed = attend_rows(q, k, v, context.mask)
        elif isinstance(context.mask, Continued):
            assert cache is not None
            mixed = attend_continued(q, k, v, (cache.past_k, cache.past_v), context.mask.start)
        elif cache is None or context.cache_slot is None:
            mixed = attend(q, k, v, context.mask)
        else:
            kept = cache = cache.append(k, v, context.cache_slot)
            mixed = cache.attend(q, context.mask)
        x = x + self.out(mixed.reshape(x.shape))
        hidden = self.norm_mlp(x)
        return x + self.down(self.up(hidden) * jax.nn.silu(self.gate(hidden))), kept


class VisionTower(nnx.Module):
    """Picture to features: ViT, resampler, norm, projection."""

    def __init__(self, config: VisionConfig, *, residual_std: float, dtype, rngs: nnx.Rngs):
        dim = config.output_dim
        self.vit = Vit(config, residual_std=residual_std, dtype=dtype, rngs=rngs)
        self.resampler = Resampler(config, dtype=dtype, rngs=rngs)
        self.norm_post = LayerNorm(dim, epsilon=config.layer_norm_epsilon, dtype=dtype)
        self.projection = Linear(dim, dim, axes=("embed", None), std=dim**-0.5, dtype=dtype, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """pixels [I, 3, S, S], normalised -> [I, Q, D]."""
        return along_batch(self.projection(self.norm_post(self.resampler(self.vit(pixels)))))


class QwenVL(nnx.Module):
    """The whole model. `layers` is one stacked Block (scanned; training) or, after `unstack`, a list (inference)."""

    def __init__(self, config: QwenVLConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        dim, std = config.hidden_size, config.initializer_range
        self.config = config
        self.embedding = Embedding(config.vocab_size, dim, axes=("vocab", "embed"), std=std, dtype=dtype, rngs=rngs)
        blocks = jax.vmap(lambda keys: Block(config, dtype=dtype, rngs=keys))(rngs.split(config.num_hidden_layers))
        self.layers: Block | nnx.List[Block] = blocks
        self.norm_final = RMSNorm(dim, epsilon=config.layer_norm_epsilon, dtype=dtype)
        self.lm_head = Linear(dim, config.vocab_size, axes=("embed", "vocab"), std=std, dtype=dtype, rngs=rngs)
        residual_std = std / (2 * config.num_hidden_layers) ** 0.5
        self.visual = VisionTower(config.visual, residual_std=residual_std, dtype=dtype, rngs=rngs)

    def encode_images(self, pixels: jax.Array) -> jax.Array:
        """pixels float32 [I, 3, S, S], normalised -> features [I, Q, D] in the model's dtype."""
        return self.visual(pixels)

    def embed(
        self, ids: jax.Array, features: jax.Array | None = None, image_slots: jax.Array | None = None
    ) -> jax.Array:
        """Token embeddings with picture features in their slots.

        ids int [B, T]; features [I, Q, D]; image_slots int [B, T]: row of `features` flattened to [I*Q, D], -1 for
        text. Returns [B, T, D].
        """
        x = self.embedding(ids)
        if features is None or image_slots is None:
            return x
        rows = features.reshape(-1, features.shape[-1])[jnp.maximum(image_slots, 0)]
        return jnp.where(image_slots[..., None] >= 0, rows.astype(x.dtype), x)

    def context(
        self,
        mask: jax.Array | PackedBlocks | PackedRows | Continued,
        positions: jax.Array,
        frequencies: jax.Array,
        *,
        training: bool = False,
        cache_slot: jax.Array | None = None,
    ) -> Context:
        """Attention context of a batch.

        mask bool [B, T, S], or what stands for it; positions int [B, T]; frequencies float32 [B, rotary_dim / 2] from
        the function of that name. Training switches logn attention off, as the original does.
        """
        cos, sin = rotary_table(positions, frequencies)
        logn = self.config.use_logn_attn and not training
        return Context(mask, cos, sin, logn_scale(positions, self.config.seq_length) if logn else None, cache_slot)

    def __call__(self, x: jax.Array, context: Context, cache: list | None = None, *, remat: Remat = "none"):
        """x [B, T, D] from `embed` -> (hidden [B, T, D] after the last norm, keys and values per layer).

        Stacked layers are scanned and return no keys and values. `remat` says what of a layer the backward pass
        computes again instead of keeping it, see `REMAT_POLICIES`; a model in training has no cache.
        """

        def body(x, layer):
            return along_batch(layer(along_batch(x), context)[0]), None

        if remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[remat])
        if isinstance(self.layers, Block):
            x, kv = jax.lax.scan(body, x, self.layers)
        elif remat != "none":
            kv = []
            for layer in self.layers:
                x, _ = body(x, layer)
        else:
            kv = []
            for i, layer in enumerate(self.layers):
                x, layer_kv = _layer(layer, x, context, None if cache is None else cache[i])
                kv.append(layer_kv)
        return self.norm_final(x), kv

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 [..., V]."""
        return self.lm_head(hidden).astype(jnp.float32)


@jax.jit
def _layer(layer: Block, x: jax.Array, context: Context, cache: kv_cache.LayerCache | None):
    """A call that all layers of a model share, so that a deep one is traced once and not layer by layer."""
    return layer(x, context, cache)


def frequencies(config: QwenVLConfig, lengths) -> np.ndarray:
    """float32 [B, rotary_dim / 2]: rotary frequencies of prompts of these lengths, on the host.

    Dynamic NTK makes them a function of the prompt's length, fixed for all that is generated after it. Pass 0 for
    training.
    """
    alphas = [ntk_alpha(int(n), config.seq_length) if config.use_dynamic_ntk else 1 for n in lengths]
    return np.stack([inverse_frequencies(config.rotary_dim, config.rotary_emb_base, alpha) for alpha in alphas])


def with_image_size(model: QwenVL, image_size: int) -> QwenVL:
    """The model for square pictures of another size in pixels, a multiple of the patch size; the weights stay.

    The position tables are interpolated to the new grid of patches, as they are at the size that the model came with.
    """
    model.config = model.config.with_image_size(image_size)
    model.visual.vit.config = model.visual.resampler.config = model.config.visual
    return model


def unstack(model: QwenVL) -> QwenVL:
    """The same model with a list of layers: decoding then reads each layer's weights in place."""
    if not isinstance(model.layers, Block):
        return model
    graph, state = nnx.split(model)
    model = nnx.merge(graph, state)  # a copy of the structure; the arrays are shared
    stacked = model.layers
    model.layers = nnx.List([jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(model.config.num_hidden_layers)])
    return model
