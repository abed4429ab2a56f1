"""Rotary embedding and the write of the KV cache in one kernel, decoding with attention too.

Why: per layer of Llama-3-8B these are three small kernels and attention's. Of a decoding step all
is latency: the new key and value are 2 kB each. The attention kernel reads them anyway; it can
rotate them, write them to the cache and attend in one launch. Of a prefill it is arithmetic that is
done again for each element (the angles' cosines): 22 µs for 1024 tokens, where 25 MB are moved.

Before:
    query: "bf16[2, 32, 1, 128]" = q * cos + rotate_half(q) * sin     # in aten's own operations
    key: "bf16[2, 8, 1, 128]" = k * cos + rotate_half(k) * sin
    keys: "bf16[2, 8, 768, 128]" = aten.index_put.default(key_cache, [None, None, position], key)
    values = aten.index_put.default(value_cache, [None, None, position], v)
    out = triton_only.attention.default(query, keys, values, mask, scale=…, enable_gqa=True)
    aten.copy_.default(key_cache, keys);  aten.copy_.default(value_cache, values)
After:
    out, keys, values = auto_functionalized_v2(triton_only.attention_rope_cache.default, query=q,
        key=k, value=v, cos=cos, sin=sin, positions=position, …, _all_bases=[key_cache, …])
    aten.copy_.default(key_cache, keys);  aten.copy_.default(value_cache, values)

of several tokens, attention stays and reads what the other two become:
    query, keys, values = auto_functionalized_v2(triton_only.rope_cache.default, …)
    out = triton_only.attention.default(query, keys, values, mask, scale=…, enable_gqa=True)

Inductor then lets the op write to the caches in place. Rotations as Llama writes them (halves) and
as GPT-J's and Meta's code does (pairs); without one, the cache write alone is fused into decoding.
Left alone: symbolic numbers of queries, caches that are not inputs of the graph or that something
else reads, keys and values written to different places, decoding with is_causal.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch

from triton_only_backend.kernels.limits import DTYPES
from triton_only_backend.passes.graph_edit import VIEWS, arguments, insert, same_sizes, value
from triton_only_backend.passes.linear_layer import base_of
from triton_only_backend.passes.refusal import decline
from triton_only_backend.passes.template import Template

aten = torch.ops.aten
ATTENTION = torch.ops.triton_only.attention.default
DECODING = torch.ops.triton_only.attention_rope_cache.default
PREFILL = torch.ops.triton_only.rope_cache.default
FUNCTIONAL = torch.ops.higher_order.auto_functionalized_v2
Tensor = torch.Tensor
Node = torch.fx.Node
# Arguments of attention that are handled here; of one query every layout is contiguous.
KNOWN = ("query", "key", "value", "attn_mask", "is_causal", "scale", "enable_gqa", "contiguous")
TABLE_VIEWS = (*VIEWS, aten.unsqueeze.default)
# (B, H, L, D) from (B, L, H, D)
HEADS_FIRST = [0, 2, 1, 3]


def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _pairs(x: Tensor, table: Tensor) -> Tensor:
    pairs = x.float().reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    rotated = torch.stack(
        [
            pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1],
            pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1],
        ],
        -1,
    )
    return rotated.flatten(3).type_as(x)


HALVES, PAIRS = Template(_halves), Template(_pairs)


class Rotated(NamedTuple):
    """What is rotated, and by what: rope is "half", "interleaved" or "none"."""

    x: Node
    rope: str
    tables: tuple[Node, ...] = ()
    order: tuple[int, ...] | None = None


class Write(NamedTuple):
    """Tokens' heads written to a cache."""

    node: Node
    cache: Node
    position: Node
    heads: Node


def as_rotated(node: Node) -> Rotated:
    """The rotary embedding whose result a node is; of no rotation where there is none."""
    inner, order = node, None
    if node.target is aten.permute.default and list(node.args[1]) == HEADS_FIRST:  # type: ignore[arg-type]
        inner, order = node.args[0], tuple(HEADS_FIRST)  # type: ignore[assignment]
    x = value(inner)
    width = x.shape[-1]
    if x.dim() == 4 and isinstance(width, int) and width % 2 == 0:
        tokens = x.shape[1 if order else 2]
        spread = [tokens, 1] if order else [1, tokens]
        tables = _halves_tables(inner, spread)
        if tables is not None:
            return Rotated(*tables, order)
        like = torch.empty(
            (*[1] * (x.dim() - 1), width // 2, 2), dtype=torch.float32, device="meta"
        )
        for dtype in dict.fromkeys((torch.float32, x.dtype)):
            found = PAIRS.match(inner, [x, like.to(dtype)])
            if found is not None and _fit(
                inner, found["x"], found["table"], spread, tail=(width // 2, 2)
            ):
                return Rotated(found["x"], "interleaved", (found["table"],), order)
    return Rotated(node, "none")


def _halves_tables(node: Node, spread: list[int]) -> tuple[Node, str, tuple[Node, ...]] | None:
    x = value(node)
    # Of one token, as the other sizes are nowhere in the graph: they may be symbolic.
    like = torch.empty((*[1] * (x.dim() - 1), x.shape[-1]), dtype=x.dtype, device="meta")
    found = HALVES.match(node, [like, like, like])
    if found is None:
        return None
    tables = (found["cos"], found["sin"])
    fit = all(_fit(node, found["x"], table, spread, tail=(x.shape[-1],)) for table in tables)
    return (found["x"], "half", tables) if fit else None


def _fit(node: Node, x: Node, table: Node, spread: list[int], tail: tuple[int, ...]) -> bool:
    """Whether a rotation changes neither shape nor dtype, and a table has a row for each token."""
    before, after, shape = value(x), value(node), value(table).shape
    # A table of fewer dimensions is broadcast over those that it lacks.
    rows = [1, 1, *shape[: -len(tail)]][-2:]
    return (
        same_sizes(before.shape, after.shape)
        and before.dtype == after.dtype
        and value(table).dtype in DTYPES
        and same_sizes(shape[-len(tail) :], tail)
        and same_sizes(rows, spread)
    )


def as_write(node: Any) -> Write | None:
    """The cache write whose result a node is, to a cache that outlives the graph."""
    if not isinstance(node, Node) or node.target is not aten.index_put.default:
        return None
    given = arguments(node)
    cache, indices, heads = given["self"], given["indices"], given["values"]
    if given["accumulate"] or len(indices) != 3 or indices[0] is not None or indices[1] is not None:
        return None
    position = indices[2]
    if position is None or value(position).dtype != torch.int64 or value(position).dim() != 1:
        return None
    if cache.op != "placeholder" or value(cache).dim() != 4 or value(heads).dim() != 4:
        return None
    # Any other reader would need the cache as it was before, or as it is after: leave that alone.
    readers = [user for user in cache.users if user is not node]
    if not all(user.target is aten.copy_.default and user.args[0] is cache for user in readers):
        return None
    return Write(node, cache, position, heads)


def fuse_rope_cache(graph: torch.fx.Graph) -> int:
    """Fuses rotation, cache write and attention; returns how many attentions."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        count += _fuse(node)
    return count


def _extras(given: dict[str, Any]) -> list[str]:
    """The arguments of an attention that the fused op has not, where they say anything."""
    defaults = {a.name: a.default_value for a in ATTENTION._schema.arguments}
    return [name for name in given if name not in KNOWN and given[name] != defaults[name]]


def _broadcasts(write: Write, tokens: int) -> bool:
    """Whether a write is of anything but so many tokens of each head."""
    batch, heads, _, dim = value(write.cache).shape
    are_tokens = same_sizes(value(write.heads).shape, (batch, heads, tokens, dim))
    return not are_tokens or not same_sizes(value(write.position).shape, [tokens])


def _obstacle(
    attention: Node, given: dict[str, Any], keys: Write | None, values: Write | None
) -> str | None:
    """Why an attention cannot be fused with its cache, None where it can."""
    query = value(given["query"])
    tokens = query.shape[2] if query.dim() == 4 else None
    if tokens == 1 and _extras(given):
        return f"{', '.join(_extras(given))}"
    if keys is None or values is None:
        return "its keys or values are no cache that tokens are written to"
    if not isinstance(tokens, int):
        return "a symbolic number of queries"
    if _broadcasts(keys, tokens) or _broadcasts(values, tokens):
        return "what is written to it is broadcast, or not of the queries' positions"
    if keys.cache is values.cache or keys.position is not values.position:
        return "one cache for both, or different positions"
    if tokens == 1 and given["is_causal"]:
        return "is_causal"
    if not same_sizes(value(keys.cache).shape[:3], value(values.cache).shape[:3]):
        return "caches of keys and values are of unlike batch, heads or length"
    heads, kv_heads = query.shape[1], value(keys.cache).shape[1]
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % max(kv_heads, 1):
        return f"{heads} heads of queries do not share {kv_heads} of keys"
    batches = {str(value(n).shape[0]) for n in (given["query"], keys.heads, keys.cache)}
    dtypes = {value(n).dtype for n in (given["query"], keys.cache, values.cache, keys.heads)}
    if len(batches) > 1 or len(dtypes) > 1:
        return "batch sizes or dtypes differ"
    for write in (keys, values):
        # Replaced by what the fused op gives, which stands right before the attention.
        others = [user for user in write.node.users if user is not attention]
        if any(user.target is not aten.copy_.default for user in others):
            return "something else reads the cache"
    return None


def _fuse(node: Node) -> int:
    given = arguments(node)
    keys, values = as_write(given["key"]), as_write(given["value"])
    obstacle = _obstacle(node, given, keys, values)
    if obstacle is not None or keys is None or values is None:
        decline(node, f"attention without its cache: {obstacle}")
        return 0
    q, k = as_rotated(given["query"]), as_rotated(keys.heads)
    if q.rope != k.rope or not _same_tables(q, k):
        q, k = Rotated(given["query"], "none"), Rotated(keys.heads, "none")
    tokens = value(given["query"]).shape[2]
    if tokens > 1 and q.rope == "none":
        decline(node, "the write of the cache alone: no rotation of queries and keys is known")
        return 0
    cos, sin = _tables(q, tokens, node)
    fused: dict[str, Any] = {
        "query": _heads_first(q, node),
        "key": _heads_first(k, node),
        "value": values.heads,
        "cos": cos,
        "sin": sin,
        "positions": _position(keys.position, node),
    }
    bases = {
        "rope": q.rope,
        "_key_cache_base_index": 0,
        "_value_cache_base_index": 1,
        "_all_bases": [keys.cache, values.cache],
    }
    if tokens == 1:
        fused["attn_mask"] = given["attn_mask"]
        both = insert(
            node, FUNCTIONAL, (DECODING,),
            fused | {"is_causal": False, "scale": given["scale"]} | bases,
        )  # fmt: skip
        node.replace_all_uses_with(insert(node, operator.getitem, (both, 0)))
    else:
        both = insert(node, FUNCTIONAL, (PREFILL,), fused | bases)
        node.replace_input_with(given["query"], insert(node, operator.getitem, (both, 0)))
    for index, write in enumerate((keys, values), 1):
        write.node.replace_all_uses_with(insert(node, operator.getitem, (both, index)))
    if tokens == 1:
        node.graph.erase_node(node)
    for write in (keys, values):
        write.node.graph.erase_node(write.node)
    return 1


def _heads_first(rotated: Rotated, before: Node) -> Node:
    if rotated.order is None:
        return rotated.x
    return insert(before, aten.permute.default, (rotated.x, list(rotated.order)))


def _same_tables(q: Rotated, k: Rotated) -> bool:
    """Whether two rotations go by the same tables, each viewed for itself."""
    return all(
        base_of(a, TABLE_VIEWS) is base_of(b, TABLE_VIEWS) and value(a).shape == value(b).shape
        for a, b in zip(q.tables, k.tables, strict=True)
    )


def _tables(rotated: Rotated, tokens: int, before: Node) -> tuple[Node | None, Node | None]:
    """cos and sin as (B or 1, tokens, width)."""
    if rotated.rope == "none":
        return None, None
    if rotated.rope == "interleaved":
        table = rotated.tables[0]
        halves = [insert(before, aten.select.int, (table, -1, i)) for i in range(2)]
    else:
        halves = list(rotated.tables)
    shaped = []
    for half in halves:
        if value(half).dim() == 4:
            of_one_head = (half, 2 if rotated.order else 1, 0)
            shaped.append(insert(before, aten.select.int, of_one_head))
        else:
            target = [1, tokens, value(half).shape[-1]]
            shaped.append(insert(before, aten.reshape.default, (half, target)))
    return shaped[0], shaped[1]


def _position(position: Node, before: Node) -> Node:
    """The slot; where it is arange(1) + start, start itself, which needs no kernel."""
    if position.target is not aten.add.Tensor or position.kwargs:
        return position
    for iota, start in (position.args[:2], position.args[1::-1]):
        if not isinstance(iota, Node) or not isinstance(start, Node):
            continue
        if iota.target is not torch.ops.prims.iota.default or value(iota).numel() != 1:
            continue
        if (
            iota.kwargs["start"] == 0
            and value(start).dtype == torch.int64
            and value(start).dim() == 0
        ):
            return insert(before, aten.reshape.default, (start, [1]))
    return position
