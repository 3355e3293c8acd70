"""Small decoders, each with one habit of real repositories that makes a model hard to cut.

A habit is a class: its forward shows the habit and nothing else, its attributes say what a cut must do with it.

    EXACT     be made, and equal one process
    REFUSED   be refused, in words that name what is in the way
    EITHER    one of the two

Shapes: ids `(B, S)`, hidden states `x` `(B, S, D)`. Ids are from 1 to 61; a row ends in `EOS`, some also in `PAD`.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

VOCAB, D, DEPTH, HEADS = 64, 16, 4, 2
PAD, EOS = 0, VOCAB - 1

EXACT, REFUSED, EITHER = "exact", "refused", "either"

HABITS: dict[str, type[Decoder]] = {}

# What a model writes outside itself. Ranks do not share it, so whoever runs stages in one process empties it between.
SIDE_CHANNELS: list[Any] = []


def token_rows(rows: int, length: int, seed: int) -> torch.Tensor:
    ids = torch.randint(1, VOCAB - 2, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = EOS
    ids[1::2, -2], ids[1::2, -1] = EOS, PAD
    return ids


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)

    def forward(self, x, mask=None, rotate=None, value=None):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        q, k = (rotate(q), rotate(k)) if rotate else (q, k)
        v = v if value is None else 0.5 * (v + value)
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.out(mixed.transpose(1, 2).flatten(2)), v


class Mlp(nn.Module):
    def __init__(self, width=D):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = nn.LayerNorm(D), Attention(), nn.LayerNorm(D), Mlp()

    def forward(self, x, **how):
        x = x + self.attention(self.norm1(x), **how)[0]
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Nothing unusual: what every habit starts from.

    Attributes:
        expect: what a cut must do.
        words: what a refusal must contain, a pattern.
        in_training: whether it is run in training mode.
        block: makes a layer.
    """

    expect = EXACT
    words = ""
    in_training = False
    block: type[nn.Module] = Block

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList(type(self).block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, VOCAB, bias=False)
        self.more()

    def __init_subclass__(cls):
        HABITS[re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()] = cls

    def more(self) -> None:
        """Modules and parameters beyond the usual."""

    def forward(self, input_ids):
        return self.finish(self.run(self.embed(input_ids)))

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def finish(self, x):
        return self.head(self.norm(x))

    @staticmethod
    def inputs(ids):
        """Positional and keyword arguments of a call."""
        return (ids,), {}

    @classmethod
    def make(cls) -> Decoder:
        """In float64, with every parameter random, so that no gradient is zero or one by chance."""
        torch.manual_seed(0)
        model = cls().double().train(cls.in_training)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model


HABITS["plain"] = Decoder


# ---- What follows the stack sees more than the last hidden state


class NormOfSumWithEmbedding(Decoder):
    def forward(self, input_ids):
        x = x0 = self.embed(input_ids)
        return self.finish(self.run(x) + x0)


class HeadOfCatWithEmbedding(Decoder):
    def more(self):
        self.head = nn.Linear(2 * D, VOCAB)

    def forward(self, input_ids):
        x0 = self.embed(input_ids)
        return self.head(torch.cat([self.norm(self.run(x0)), x0], -1))


class NormOfSumWithDetachedEmbedding(Decoder):
    def forward(self, input_ids):
        x0 = self.embed(input_ids)
        return self.finish(self.run(x0) + x0.detach())


class SkipFromAMiddleLayerToTheHead(Decoder):
    def forward(self, input_ids):
        x = self.embed(input_ids)
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == 0:
                kept = x
        return self.finish(x + kept)


class UNetSkips(Decoder):
    def run(self, x):
        kept = []
        for index, layer in enumerate(self.layers):
            if index >= DEPTH // 2:
                x = x + kept.pop()
            x = layer(x)
            if index < DEPTH // 2:
                kept.append(x)
        return x


class MeanOfAllLayers(Decoder):
    def run(self, x):
        states = [x := layer(x) for layer in self.layers]
        return torch.stack(states).mean(0)


class LearnedMixOfLayers(Decoder):
    def more(self):
        self.mix = nn.Parameter(torch.zeros(DEPTH + 1))

    def run(self, x):
        states = [x, *(x := layer(x) for layer in self.layers)]
        return sum(weight * state for weight, state in zip(self.mix.softmax(0), states, strict=True))


class ConcatenationOfTheLastLayers(Decoder):
    def more(self):
        self.norm, self.head = nn.LayerNorm(3 * D), nn.Linear(3 * D, VOCAB)

    def run(self, x):
        states = [x := layer(x) for layer in self.layers]
        return torch.cat(states[-3:], dim=-1)


class HeadOnEveryLayer(Decoder):
    """Deep supervision."""

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return torch.stack([self.finish(x := layer(x)) for layer in self.layers], dim=1)


class ChosenLayersByIndex(Decoder):
    """The `out_indices` of backbones."""

    def forward(self, input_ids):
        states = {-1: self.embed(input_ids)}
        for index, layer in enumerate(self.layers):
            states[index] = layer(states[index - 1])
        return self.finish(states[DEPTH - 1] + states[0] * states[1].sigmoid())


class EmbeddingAddedBeforeEveryLayer(Decoder):
    def run(self, x):
        x0 = x
        for layer in self.layers:
            x = layer(x + x0)
        return x


class ConditionedBlock(Block):
    def forward(self, x, given):
        return super().forward(x) + self.mlp(given)


class EmbeddingGivenToEveryLayer(Decoder):
    block = ConditionedBlock

    def run(self, x):
        x0 = x
        for layer in self.layers:
            x = layer(x, x0)
        return x


class FirstLayersOutputGivenToLaterLayers(Decoder):
    block = ConditionedBlock

    def run(self, x):
        first = None
        for layer in self.layers:
            x = layer(x, x if first is None else first)
            first = x if first is None else first
        return x


# ---- Work between the layers


class HiddenScaledByAConstantBetweenLayers(Decoder):
    def run(self, x):
        for layer in self.layers:
            x = layer(x) * 0.5
        return x


class HiddenScaledByARootParameterBetweenLayers(Decoder):
    def more(self):
        self.scale = nn.Parameter(torch.ones(()))

    def run(self, x):
        for layer in self.layers:
            x = layer(x) * self.scale
        return x


class ScalarsPerLayerInOneParameter(Decoder):
    """The `resid_lambdas` and `x0_lambdas` of nanochat."""

    def more(self):
        self.of_hidden, self.of_embedding = nn.Parameter(torch.ones(DEPTH)), nn.Parameter(torch.zeros(DEPTH))

    def run(self, x):
        x0 = x
        for index, layer in enumerate(self.layers):
            x = layer(self.of_hidden[index] * x + self.of_embedding[index] * x0)
        return x


class ScalarsPerLayerInAParameterList(Decoder):
    def more(self):
        self.gates = nn.ParameterList(nn.Parameter(torch.ones(D)) for _ in range(DEPTH))

    def run(self, x):
        for gate, layer in zip(self.gates, self.layers, strict=True):
            x = x + gate * layer(x)
        return x


class ResidualOutsideTheLayersScaledByDepth(Decoder):
    def run(self, x):
        for index, layer in enumerate(self.layers):
            x = x + layer(self.norm(x)) / math.sqrt(index + 1)
        return x


class NormAfterEveryLayerAndAtTheEnd(Decoder):
    def run(self, x):
        for layer in self.layers:
            x = self.norm(layer(x))
        return x


class ListsOfPairsOfAttentionAndMlp(Decoder):
    """The layers are lists; the root runs what is in them."""

    expect = EITHER

    def more(self):
        self.layers = nn.ModuleList(nn.ModuleList([Attention(), Mlp()]) for _ in range(DEPTH))

    def run(self, x):
        for attention, mlp in self.layers:
            x = x + attention(x)[0]
            x = x + mlp(x)
        return x


class ModulesBetweenTheLayersInASecondList(Decoder):
    expect = EITHER

    def more(self):
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(DEPTH))

    def run(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


class RunningSumOverTheSequenceBetweenLayers(Decoder):
    def run(self, x):
        for layer in self.layers:
            x = layer(x)
            x = x + 0.1 * x.cumsum(1)
        return x


class BatchMeanSubtractedBetweenLayers(Decoder):
    def run(self, x):
        for layer in self.layers:
            x = layer(x)
            x = x - x.mean(0, keepdim=True)
        return x


class HiddenDetachedInTheMiddle(Decoder):
    def run(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(x.detach() if index == 2 else x)
        return x


class HiddenDetachedBeforeTheLastLayer(Decoder):
    def run(self, x):
        for layer in self.layers[:-1]:
            x = layer(x)
        return self.layers[-1](x.detach())


class ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -0.3 * gradient


class GradientReversedBetweenLayers(Decoder):
    def run(self, x):
        for layer in self.layers:
            x = ReverseGradient.apply(layer(x))
        return x


class GradientReversedTowardsTheEmbedding(Decoder):
    def forward(self, input_ids):
        x0 = self.embed(input_ids)
        return self.finish(self.run(x0) + ReverseGradient.apply(x0))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class QuantisedBetweenLayers(Decoder):
    def run(self, x):
        for layer in self.layers:
            x = StraightThrough.apply(layer(x))
        return x


class GradientHookOnTheHiddenState(Decoder):
    """`tensor.register_hook`: seen by no operator."""

    expect = EITHER

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
            if x.requires_grad:
                x.register_hook(lambda gradient: gradient * 0.5)
        return x


# ---- Layers that return more than a hidden state


class ValueResidualBlock(Block):
    def forward(self, x, value=None):
        mixed, v = self.attention(self.norm1(x), value=value)
        x = x + mixed
        return x + self.mlp(self.norm2(x)), v


class FirstLayersValuesGivenToAllLayers(Decoder):
    block = ValueResidualBlock

    def run(self, x):
        first = None
        for layer in self.layers:
            x, v = layer(x, first)
            first = v if first is None else first
        return x


class ValuesHandedFromLayerToLayer(Decoder):
    block = ValueResidualBlock

    def run(self, x):
        v = None
        for layer in self.layers:
            x, v = layer(x, v)
        return x


class NestedTupleBlock(ValueResidualBlock):
    def forward(self, x, shared=None):
        x, v = super().forward(x, None if shared is None else shared[0] * shared[1].sigmoid())
        return x, (v, v.tanh())


class KeysAndValuesOfTheFirstHalfReused(Decoder):
    """YOCO."""

    block = NestedTupleBlock

    def run(self, x):
        shared = None
        for index, layer in enumerate(self.layers):
            x, own = layer(x, shared if index >= 2 else None)
            shared = own if index == 1 else shared
        return x


class ScoresBlock(Block):
    def forward(self, x, before=None):
        h = self.norm1(x)
        scores = h @ h.mT / math.sqrt(D)
        scores = scores if before is None else scores + before
        causal = torch.ones_like(scores, dtype=torch.bool).triu(1)
        x = x + scores.masked_fill(causal, -1e9).softmax(-1) @ h
        return x + self.mlp(self.norm2(x)), scores


class AttentionScoresHandedOn(Decoder):
    """RealFormer: what is handed on is `(B, S, S)`."""

    block = ScoresBlock

    def more(self):
        for layer in self.layers:
            del layer.attention

    def run(self, x):
        scores = None
        for layer in self.layers:
            x, scores = layer(x, scores)
        return x


class TwoStreamBlock(Block):
    def forward(self, x, residual=None):
        residual = x if residual is None else x + residual
        return self.mlp(self.attention(self.norm1(residual))[0]), residual


class HiddenAndResidualStreams(Decoder):
    """Mamba: the residual is None at first."""

    block = TwoStreamBlock

    def forward(self, input_ids):
        x, residual = self.embed(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual)
        return self.finish(x + residual)


class ReversibleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(), Mlp()

    def forward(self, x1, x2):
        y1 = x1 + self.attention(x2)[0]
        return y1, x2 + self.mlp(y1)


class ReversibleHalves(Decoder):
    block = ReversibleBlock

    def run(self, x):
        x1, x2 = x, x.clone()
        for layer in self.layers:
            x1, x2 = layer(x1, x2)
        return x1 * x2.sigmoid()


class RoutedBlock(Block):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, 4, bias=False)

    def forward(self, x):
        scores = self.router(x)
        weight, expert = scores.softmax(-1).max(-1)
        x = super().forward(x) * (1 + weight * (1 + expert))[..., None]
        return x, scores


class RouterScoresSummedIntoTheOutput(Decoder):
    block = RoutedBlock

    def forward(self, input_ids):
        x, scores = self.embed(input_ids), []
        for layer in self.layers:
            x, score = layer(x)
            scores.append(score)
        return self.finish(x) + torch.stack(scores).logsumexp(-1).square().mean(0)[..., None]


class RouterScoresReturnedInADict(Decoder):
    expect = EITHER
    block = RoutedBlock

    def forward(self, input_ids):
        x, loss = self.embed(input_ids), 0.0
        for layer in self.layers:
            x, score = layer(x)
            loss = loss + score.logsumexp(-1).square().mean()
        return {"logits": self.finish(x), "router_loss": loss}


class ScalarLossBlock(RoutedBlock):
    def forward(self, x):
        x, scores = super().forward(x)
        return x, scores.logsumexp(-1).square().mean()


class ScalarLossesOfLayersAddedToTheOutput(Decoder):
    expect = EITHER
    block = ScalarLossBlock

    def forward(self, input_ids):
        x, total = self.embed(input_ids), 0.0
        for layer in self.layers:
            x, loss = layer(x)
            total = total + loss
        return self.finish(x) + total


class ScalarLossCarriedThroughTheLayers(Decoder):
    """fairseq's `l_aux`: the layer takes the sum so far and returns the new one."""

    expect = EITHER

    class block(ScalarLossBlock):  # noqa: N801
        def forward(self, x, total):
            x, loss = super().forward(x)
            return x, total + loss

    def forward(self, input_ids):
        x, total = self.embed(input_ids), torch.zeros(())
        for layer in self.layers:
            x, total = layer(x, total)
        return self.finish(x) * total.tanh()


class ReusedRoutesBlock(RoutedBlock):
    def forward(self, x, route=None):
        route = self.router(x).argmax(-1) if route is None else route
        return Block.forward(self, x) * (1 + route)[..., None], route


class RoutesOfTheFirstLayerReused(Decoder):
    """What is handed on is int64."""

    expect = EITHER
    block = ReusedRoutesBlock

    def more(self):
        for layer in self.layers[1:]:
            del layer.router
        self.layers[0].router.requires_grad_(False)

    def run(self, x):
        route = None
        for layer in self.layers:
            x, route = layer(x, route)
        return x


class HaltingProbabilityAccumulated(Decoder):
    """Adaptive computation time with a soft weight."""

    def more(self):
        self.halt = nn.Linear(D, 1)

    def run(self, x):
        left, total = torch.ones_like(x[..., :1]), torch.zeros_like(x)
        for layer in self.layers:
            x = layer(x)
            p = self.halt(x).sigmoid()
            total, left = total + left * p * x, left * (1 - p)
        return total + left * x


class TokensThatHaltKeepTheirState(Decoder):
    """What crosses is a mask of bools made from the hidden state."""

    expect = EITHER

    def run(self, x):
        active = torch.ones(x.shape[:2], dtype=torch.bool)
        for layer in self.layers:
            x = torch.where(active[..., None], layer(x), x)
            active = active & (x[..., 0] < 1)
        return x


class LayersThatReturnDicts(Decoder):
    expect = EITHER

    class block(Block):  # noqa: N801
        def forward(self, x):
            return {"hidden": super().forward(x)}

    def run(self, x):
        for layer in self.layers:
            x = layer(x)["hidden"]
        return x


class LayersThatReturnLists(Decoder):
    expect = EITHER

    class block(Block):  # noqa: N801
        def forward(self, x):
            return [super().forward(x)]

    def run(self, x):
        for layer in self.layers:
            [x] = layer(x)
        return x


class LayersThatTakeTheHiddenStateSecond(Decoder):
    expect = EITHER

    class block(Block):  # noqa: N801
        def forward(self, rate, x):
            return super().forward(x) * rate

    def run(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(0.5 + 0.1 * index, x)
        return x


class LayersThatTakeTheHiddenStateByAnotherName(Decoder):
    def run(self, x):
        for layer in self.layers:
            x = layer(x=x)
        return x


# ---- Ids used late


class GateFromIds(Decoder):
    def more(self):
        self.gate = nn.Embedding(VOCAB, D)

    def forward(self, input_ids):
        gate = self.gate(input_ids).sigmoid()
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x) * gate
        return self.finish(x)


class GateFromIdsAfterTheStack(Decoder):
    def more(self):
        self.gate = nn.Embedding(VOCAB, D)

    def forward(self, input_ids):
        return self.finish(self.run(self.embed(input_ids)) * self.gate(input_ids).sigmoid())


class ScaleFromIds(Decoder):
    def forward(self, input_ids):
        scale = 1 + input_ids.double().mean() / VOCAB
        return self.finish(self.run(self.embed(input_ids))) * scale


class ScaleFromIdsAsANumber(Decoder):
    expect = EITHER

    def forward(self, input_ids):
        longest = (input_ids != PAD).sum(1).max().item()
        return self.finish(self.run(self.embed(input_ids))) / longest


class PaddingMaskFromIds(Decoder):
    def forward(self, input_ids):
        causal = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
        mask = (causal & (input_ids != PAD)[:, None]) | torch.eye(input_ids.shape[1], dtype=torch.bool)
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, mask=mask[:, None])
        return self.finish(x)


class PaddingMultipliedAwayBetweenLayers(Decoder):
    def forward(self, input_ids):
        keep = (input_ids != PAD)[..., None]
        x = self.embed(input_ids) * keep
        for layer in self.layers:
            x = layer(x) * keep
        return self.finish(x)


class PositionsFromIds(Decoder):
    """OPT."""

    def more(self):
        self.places = nn.Embedding(32, D)

    def forward(self, input_ids):
        places = (input_ids != PAD).cumsum(1) * (input_ids != PAD)
        return self.finish(self.run(self.embed(input_ids) + self.places(places)))


class LastTokenFromIds(Decoder):
    """Sequence classification."""

    def forward(self, input_ids):
        last = (input_ids != PAD).sum(1) - 1
        return self.finish(self.run(self.embed(input_ids))[torch.arange(len(input_ids)), last])


class LastTokenFromIdsByArgmax(Decoder):
    """CLIP's text model."""

    def forward(self, input_ids):
        x = self.run(self.embed(input_ids))
        return self.finish(x[torch.arange(x.shape[0]), input_ids.argmax(-1)])


class RowsWhereIdsAreEos(Decoder):
    """T5's classification head: the number of rows depends on the values of the ids."""

    expect = EITHER

    def forward(self, input_ids):
        x = self.run(self.embed(input_ids))
        return self.finish(x[torch.where(input_ids == EOS)])


class LoopCountFromIds(Decoder):
    expect = EITHER

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers[: 2 + int(input_ids[0, 0]) % 3]:
            x = layer(x)
        return self.finish(x)


class BranchOnIds(Decoder):
    expect = EITHER

    def forward(self, input_ids):
        logits = self.finish(self.run(self.embed(input_ids)))
        return logits * 2 if (input_ids == 7).any() else logits


class ModulationFromIds(Decoder):
    """FiLM: what the layers' outputs are multiplied by is `(B, 1, D)`."""

    def more(self):
        self.condition, self.film = nn.Embedding(VOCAB, D), nn.Linear(D, 2 * D)

    def forward(self, input_ids):
        scale, shift = self.film(self.condition(input_ids).mean(1, keepdim=True)).chunk(2, -1)
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x) * (1 + scale) + shift
        return self.finish(x)


class EmbeddingsPerLayer(Decoder):
    """Gemma 3n."""

    block = ConditionedBlock

    def more(self):
        self.per_layer = nn.Embedding(VOCAB, DEPTH * D)

    def forward(self, input_ids):
        given = self.per_layer(input_ids).unflatten(-1, (DEPTH, D))
        x = self.embed(input_ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, given[:, :, index])
        return self.finish(x)


class ValueEmbeddingsForSomeLayers(Decoder):
    """The value embeddings of modded-nanogpt, for the first and the last layer."""

    def more(self):
        self.values = nn.ModuleList(nn.Embedding(VOCAB, D) for _ in range(2))

    def forward(self, input_ids):
        values = [table(input_ids).unflatten(-1, (HEADS, -1)).transpose(1, 2) for table in self.values]
        x = self.embed(input_ids)
        for layer, value in zip(self.layers, [values[0], None, None, values[1]], strict=True):
            x = layer(x, value=value)
        return self.finish(x)


class EmbeddingOfHashedPairsOfIds(Decoder):
    def more(self):
        self.pairs = nn.Embedding(32, D)

    def forward(self, input_ids):
        pairs = (input_ids * 31 + input_ids.roll(1, 1)) % 32
        return self.finish(self.run(self.embed(input_ids)) + self.pairs(pairs))


class ShiftedIdsEmbeddedAgainAtTheEnd(Decoder):
    """Heads that predict several tokens: the head of the second embeds the next id with the shared embedding."""

    def more(self):
        self.join, self.second = nn.Linear(2 * D, D), Block()

    def forward(self, input_ids):
        x = self.run(self.embed(input_ids))
        following = self.embed(input_ids.roll(-1, 1))
        later = self.second(self.join(torch.cat([self.norm(x), following], -1)))
        return torch.cat([self.finish(x), self.finish(later)], 1)


class MeanOverTokensThatAreNotPadding(Decoder):
    def forward(self, input_ids):
        keep = (input_ids != PAD)[..., None].double()
        x = self.run(self.embed(input_ids))
        return self.finish((x * keep).sum(1) / keep.sum(1))


# ---- Values of the hidden state in Python


class EarlyExitOnTheHiddenState(Decoder):
    expect, words = REFUSED, r"layers\.\d"

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
            if x.norm(dim=-1).mean() > 5:
                break
        return x


class NumberReadFromAHiddenState(Decoder):
    expect, words = REFUSED, r"layers\.\d"

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == 0:
                scale = x.abs().mean().item()
        return self.finish(x) / scale


class NumberReadFromTheEmbedding(Decoder):
    expect, words = REFUSED, r"embed"

    def forward(self, input_ids):
        x = self.embed(input_ids)
        scale = float(x.detach().abs().max())
        return self.finish(self.run(x / scale)) * scale


class BranchOnAHiddenState(Decoder):
    expect, words = REFUSED, r"layers\.\d"

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
            x = x * 0.5 if (x[..., 0] > 0.2).float().mean() > 0.5 else x * 2
        return x


class ListOfNumbersFromAHiddenState(Decoder):
    expect, words = REFUSED, r"layers\.\d"

    def forward(self, input_ids):
        x = self.layers[0](self.embed(input_ids))
        rates = x.detach().mean((0, 1)).tolist()
        for layer in self.layers[1:]:
            x = layer(x)
        return self.finish(x * torch.tensor(rates))


class TokensSelectedByTheHiddenState(Decoder):
    """Mixture of depths: the shapes do not depend on values, the rows that are taken do."""

    expect = EITHER

    def run(self, x):
        for layer in self.layers:
            top = x[..., 0].topk(3, dim=1).indices.sort(1).values[..., None].expand(-1, -1, D)
            x = x.scatter_add(1, top, layer(x.gather(1, top)))
        return x


class NumberMadeFromAParameter(Decoder):
    expect = EITHER

    def more(self):
        self.scale = nn.Parameter(torch.tensor(0.7), requires_grad=False)

    def run(self, x):
        scale = float(self.scale)
        for layer in self.layers:
            x = layer(x) * scale
        return x


class BranchOnAParameterOfTheEmbedding(Decoder):
    expect = EITHER

    def forward(self, input_ids):
        logits = self.finish(self.run(self.embed(input_ids)))
        return logits * 3 if self.embed.weight.detach().norm() > 1 else logits


# ---- In place, views, layouts


class EmbeddingChangedInPlace(Decoder):
    def more(self):
        self.places = nn.Parameter(torch.zeros(32, D))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        x += self.places[: x.shape[1]]
        x.mul_(math.sqrt(D))
        return self.finish(self.run(x))


class EmbeddingChangedInPlaceAfterItWasKept(Decoder):
    """What was kept changes too."""

    def forward(self, input_ids):
        x0 = self.embed(input_ids)
        x = x0.mul_(2)
        return self.finish(self.run(x) + x0)


class EmbeddingChangedInPlaceAfterTheStack(Decoder):
    def forward(self, input_ids):
        x0 = self.embed(input_ids)
        x = self.run(x0 * 1)
        x0.mul_(0.25)
        return self.finish(x + x0)


class HiddenChangedInPlaceBetweenLayers(Decoder):
    def run(self, x):
        for layer in self.layers:
            x = layer(x)
            x.add_(0.1)
            x *= 0.5
        return x


class OneColumnWrittenBetweenLayers(Decoder):
    def run(self, x):
        for layer in self.layers:
            x = layer(x)
            x[:, :, 0] = x[:, :, 1] * 0.5
        return x


class WritingBlock(Block):
    def forward(self, x):
        x += self.attention(self.norm1(x.clone()))[0]
        x.add_(self.mlp(self.norm2(x.clone())))
        return x


class LayersThatWriteToTheirInput(Decoder):
    block = WritingBlock


class EmbeddingKeptWhileLayersWriteToIt(Decoder):
    """What was kept is the last hidden state."""

    expect = EITHER
    block = WritingBlock

    def forward(self, input_ids):
        x0 = self.embed(input_ids)
        return self.finish(self.run(x0) + x0)


class ListOfStatesWhileLayersWriteToThem(Decoder):
    """All entries are one tensor."""

    expect = EITHER
    block = WritingBlock

    def run(self, x):
        states = [x := layer(x) for layer in self.layers]
        return states[0] + 0.5 * states[1] + states[3]


class SequenceFirst(Decoder):
    class block(Block):  # noqa: N801
        def forward(self, x):
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    def forward(self, input_ids):
        x = self.embed(input_ids).transpose(0, 1)
        return self.finish(self.run(x).transpose(0, 1))


class LayersThatReturnNonContiguousTensors(Decoder):
    class block(Block):  # noqa: N801
        def forward(self, x):
            return super().forward(x).transpose(1, 2).contiguous().transpose(1, 2)


class LayersThatReturnViews(Decoder):
    class block(Block):  # noqa: N801
        def forward(self, x):
            return torch.cat([super().forward(x), x], -1)[..., :D]


class ChannelsBeforeTheSequence(Decoder):
    """The hidden state is `(B, D, S)`."""

    class block(nn.Module):  # noqa: N801
        def __init__(self):
            super().__init__()
            self.mix = nn.Conv1d(D, D, 3)

        def forward(self, x):
            return x + self.mix(F.pad(x, (2, 0))).tanh()

    def forward(self, input_ids):
        return self.finish(self.run(self.embed(input_ids).transpose(1, 2)).transpose(1, 2))


class TokensFlattenedIntoRows(Decoder):
    """The hidden state is `(B S, D)`."""

    expect = EITHER

    class block(nn.Module):  # noqa: N801
        def __init__(self):
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(D), Mlp()

        def forward(self, x):
            return x + self.mlp(self.norm(x))

    def forward(self, input_ids):
        x = self.run(self.embed(input_ids).flatten(0, 1))
        return self.finish(x).unflatten(0, input_ids.shape)


class SeveralResidualStreams(Decoder):
    """Hyper-connections: the hidden state is `(B, S, N, D)`."""

    class block(Block):  # noqa: N801
        def __init__(self):
            super().__init__()
            self.read, self.write = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x + self.write[:, None] * super().forward((self.read[:, None] * x).sum(2))[:, :, None]

    def forward(self, input_ids):
        x = self.embed(input_ids)[:, :, None].expand(-1, -1, 3, -1)
        return self.finish(self.run(x).mean(2))


class RegistersBeforeTheTokens(Decoder):
    """They run through the stack and are taken off after it."""

    def more(self):
        self.registers = nn.Parameter(torch.randn(2, D))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        x = self.run(torch.cat([self.registers.expand(len(x), -1, -1), x], 1))
        return self.finish(x[:, 2:])


class PromptsFromAnEmbedding(Decoder):
    """Prompt tuning."""

    def more(self):
        self.prompt = nn.Embedding(3, D)

    def forward(self, input_ids):
        prompt = self.prompt(torch.arange(3).expand(len(input_ids), -1))
        return self.finish(self.run(torch.cat([prompt, self.embed(input_ids)], 1))[:, 3:])


class SummaryTokenReadAtTheEnd(Decoder):
    def more(self):
        self.summary = nn.Parameter(torch.randn(1, 1, D))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.finish(self.run(torch.cat([x, self.summary.expand(len(x), 1, D)], 1))[:, -1])


class LogitsOfTheLastTokenOnly(Decoder):
    def forward(self, input_ids):
        return self.finish(self.run(self.embed(input_ids))[:, -1:])


class EverySecondTokenDroppedHalfWay(Decoder):
    """Funnel: neighbouring stages see other lengths."""

    expect = EITHER

    def run(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(x if index != 2 else x[:, ::2])
        return x


class WidthChangedHalfWay(Decoder):
    expect = EITHER

    class block(nn.Module):  # noqa: N801
        def __init__(self):
            super().__init__()
            self.mlp, self.out = Mlp(), nn.Linear(D, D)

        def forward(self, x):
            return self.out(x + self.mlp(x))

    def more(self):
        self.layers[1].out, self.layers[2].mlp = nn.Linear(D, D // 2), Mlp(D // 2)
        self.layers[2].out = nn.Linear(D // 2, D)


class PooledRowsWrittenByIndex(Decoder):
    """Zeros like the hidden state, filled in place by index."""

    def forward(self, input_ids):
        x = self.run(self.embed(input_ids))
        pooled = x.new_zeros(x.shape[0], 8, D)
        pooled.scatter_add_(1, (input_ids % 8)[..., None].expand_as(x), x)
        return self.finish(pooled)


class EmptyFilledWithHiddenStates(Decoder):
    def run(self, x):
        states = torch.empty((DEPTH, *x.shape), dtype=x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x)
            states[index] = x
        return states.sum(0)


class MasksFilledWithTheEmbedding(Decoder):
    def forward(self, input_ids):
        x0 = self.embed(input_ids)
        x = torch.where((input_ids % 3 == 0)[..., None], x0, self.run(x0))
        return self.finish(x.masked_fill((input_ids == PAD)[..., None], 0.0))


class ZerosLikeTheEmbeddingAccumulate(Decoder):
    """What accumulates is made before the stack and holds no value then."""

    def run(self, x):
        total = torch.zeros_like(x)
        for layer in self.layers:
            x = layer(x)
            total += x
        return total


class NormsInFloat32(Decoder):
    class block(Block):  # noqa: N801
        def __init__(self):
            super().__init__()
            self.last = nn.LayerNorm(D, elementwise_affine=False)

        def forward(self, x):
            return self.last(super().forward(x).float()).to(x.dtype)

    def finish(self, x):
        return self.head(F.layer_norm(x.float(), (D,)).to(x.dtype) * self.norm.weight + self.norm.bias)


# ---- Modules shared, repeated, reordered, left out


class OneAttentionInAllLayers(Decoder):
    def more(self):
        for layer in self.layers[1:]:
            layer.attention = self.layers[0].attention


class OneMlpInEverySecondLayer(Decoder):
    def more(self):
        for index in (0, 1):
            self.layers[index + 2].mlp = self.layers[index].mlp


class OneRootModuleInAllLayers(Decoder):
    """Zamba: a block that is the root's, called by every layer with the hidden state and the embedding."""

    expect = EITHER

    class block(Block):  # noqa: N801
        def forward(self, x, x0, shared):
            return super().forward(x) + shared(x0)

    def more(self):
        self.shared = Mlp()

    def run(self, x):
        x0 = x
        for layer in self.layers:
            x = layer(x, x0, self.shared)
        return x


class OneLayerObjectFourTimes(Decoder):
    expect = EITHER

    def more(self):
        self.layers = nn.ModuleList([Block()] * DEPTH)


class LayersSharedInPairs(Decoder):
    """MobileLLM: each layer runs twice in a row."""

    expect = EITHER

    def run(self, x):
        for layer in self.layers:
            x = layer(layer(x))
        return x


class StackRunTwice(Decoder):
    """Universal and looped transformers."""

    expect, words = REFUSED, r"layers.*(order|twice|again)|(order|twice|again).*layers"

    def run(self, x):
        for _ in range(2):
            x = super().run(x)
        return x


class LayersRunInReverse(Decoder):
    expect, words = REFUSED, r"layers.*(order|before|after)|(order|before|after).*layers"

    def run(self, x):
        for layer in reversed(self.layers):
            x = layer(x)
        return x


class LayersInAnOrderOfTheirOwn(Decoder):
    expect, words = REFUSED, r"layers.*(order|before|after)|(order|before|after).*layers"

    def run(self, x):
        for index in (0, 2, 1, 3):
            x = self.layers[index](x)
        return x


class LayersLeftOut(Decoder):
    expect = EITHER

    def run(self, x):
        for layer in (self.layers[0], self.layers[2], self.layers[3]):
            x = layer(x)
        return x


class ModulesNobodyRuns(Decoder):
    def more(self):
        self.unused, self.layers[1].unused = nn.Linear(D, D), nn.Linear(D, D)


class AdapterRegisteredAfterTheHead(Decoder):
    def more(self):
        self.adapter = nn.Linear(D, D)

    def forward(self, input_ids):
        return self.finish(self.run(self.adapter(self.embed(input_ids))))


class HeadRegisteredBeforeTheStack(Decoder):
    def __init__(self):
        nn.Module.__init__(self)
        self.head, self.norm = nn.Linear(D, VOCAB), nn.LayerNorm(D)
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))
        self.embed = nn.Embedding(VOCAB, D)


class AdapterOnBothSidesOfTheStack(Decoder):
    def more(self):
        self.adapter = nn.Linear(D, D)

    def forward(self, input_ids):
        return self.finish(self.adapter(self.run(self.adapter(self.embed(input_ids)))))


class SequentialStack(Decoder):
    expect = EITHER

    def more(self):
        self.layers = nn.Sequential(*self.layers)

    def run(self, x):
        return self.layers(x)


class DictOfLayers(Decoder):
    expect = EITHER

    def more(self):
        self.layers = nn.ModuleDict({f"layer_{index}": layer for index, layer in enumerate(self.layers)})

    def run(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


class TwoStacksInARow(Decoder):
    expect = EITHER

    def more(self):
        self.layers, self.top = self.layers[:2], nn.ModuleList(self.layers[2:])

    def run(self, x):
        for layer in (*self.layers, *self.top):
            x = layer(x)
        return x


class EncoderWhoseMemoryEveryLayerReads(Decoder):
    block = ConditionedBlock

    def more(self):
        self.encoder = nn.ModuleList(Mlp() for _ in range(2))

    def forward(self, input_ids):
        memory = self.embed(input_ids)
        for layer in self.encoder:
            memory = memory + layer(memory)
        x = self.embed(F.pad(input_ids[:, :-1], (1, 0)))
        for layer in self.layers:
            x = layer(x, memory)
        return self.finish(x)


class StackDeepInsideWrappers(Decoder):
    class Inner(nn.Module):
        def __init__(self, embed, blocks, norm):
            super().__init__()
            self.embed, self.blocks, self.norm = embed, nn.ModuleDict({"all": blocks}), norm

        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks["all"]:
                x = block(x)
            return self.norm(x)

    def more(self):
        self.model = nn.Module()
        self.model.decoder = self.Inner(self.embed, self.layers, self.norm)
        del self.embed, self.layers, self.norm

    def forward(self, input_ids):
        return self.head(self.model.decoder(input_ids))


# ---- Ties


class FunctionalTie(Decoder):
    def more(self):
        del self.head

    def finish(self, x):
        return F.linear(self.norm(x), self.embed.weight)


class TransposedTie(Decoder):
    def more(self):
        del self.head

    def finish(self, x):
        return self.norm(x) @ self.embed.weight.t()


class TiedModules(Decoder):
    def more(self):
        self.head.weight = self.embed.weight


class TieThroughAProperty(Decoder):
    def more(self):
        del self.head

    @property
    def output_weight(self):
        return self.embed.weight[:VOCAB]

    def finish(self, x):
        return F.linear(self.norm(x), self.output_weight)


class TieThroughAFunctionOfTheHead(Decoder):
    """The head keeps a function that returns the weight."""

    expect = EITHER

    class Head(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight
            self.bias = nn.Parameter(torch.zeros(VOCAB))

        def forward(self, x):
            return F.linear(x, self.weight(), self.bias)

    def more(self):
        self.head = self.Head(lambda: self.embed.weight)


class SoftTokensThroughTheEmbedding(Decoder):
    """The weight of the embedding read between layers: a soft prediction embedded again."""

    expect = EITHER

    def run(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == 1:
                x = x + self.head(self.norm(x)).softmax(-1) @ self.embed.weight
        return x


class PenaltyOnTheEmbeddingInTheOutput(Decoder):
    def finish(self, x):
        return super().finish(x) + self.embed.weight.square().mean()


class PenaltyOnAllParametersInTheOutput(Decoder):
    expect = EITHER

    def finish(self, x):
        return super().finish(x) + sum(p.square().sum() for p in self.parameters()) / 1000


class WeightOfTheFirstLayerReadAtTheEnd(Decoder):
    expect = EITHER

    def finish(self, x):
        return super().finish(x + F.linear(x, self.layers[0].attention.out.weight))


class WeightNormOnTheHead(Decoder):
    def more(self):
        self.head = nn.utils.parametrizations.weight_norm(self.head)


class WeightsNormalisedInForward(Decoder):
    """nGPT: the forward changes its own weights."""

    expect = EITHER

    def forward(self, input_ids):
        with torch.no_grad():
            self.embed.weight.copy_(F.normalize(self.embed.weight, dim=-1))
            self.head.weight.copy_(F.normalize(self.head.weight, dim=-1))
        return super().forward(input_ids)


# ---- State, side channels, hooks


class TableCachedOnTheRoot(Decoder):
    def forward(self, input_ids):
        length = input_ids.shape[1]
        self.table = torch.arange(length)[:, None] / torch.arange(1, D + 1)
        x = self.run(self.embed(input_ids) + self.table.sin())
        return self.finish(x + self.table.cos())


class HiddenStateCachedOnTheRoot(Decoder):
    def run(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == 0:
                self.first = x
        return x + self.first


class CachingBlock(Block):
    def forward(self, x, source=None):
        if source is None:
            self.cached = x.tanh()
            return super().forward(x)
        return super().forward(x) + source.cached


class ValueCachedOnALayerForLaterLayers(Decoder):
    expect, words = REFUSED, r"layers\.\d|cached"
    block = CachingBlock

    def run(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(x, self.layers[0] if index else None)
        return x


class ValueCachedOnALayerReadByTheRoot(Decoder):
    expect, words = REFUSED, r"layers\.\d|cached"
    block = CachingBlock

    def finish(self, x):
        return super().finish(x + self.layers[0].cached)


class RecordingBlock(Block):
    def forward(self, x, ledger):
        x = x + ledger["first"] if "first" in ledger else x
        x = super().forward(x)
        ledger.setdefault("first", x)
        return x


class LedgerPassedThroughLayers(Decoder):
    expect, words = REFUSED, r"layers\.\d|first|ledger|dict"
    block = RecordingBlock

    def run(self, x):
        ledger = {}
        for layer in self.layers:
            x = layer(x, ledger)
        return x


class ListThatLayersAppendTo(Decoder):
    expect, words = REFUSED, r"layers\.\d|list"

    class block(RoutedBlock):  # noqa: N801
        def forward(self, x, losses):
            x, scores = super().forward(x)
            losses.append(scores.logsumexp(-1, keepdim=True))
            return x

    def run(self, x):
        losses = []
        for layer in self.layers:
            x = layer(x, losses)
        return x + torch.stack(losses).mean(0)


_GLOBAL: dict[str, torch.Tensor] = {}
_TAPPED: list[torch.Tensor] = []
SIDE_CHANNELS += [_GLOBAL, _TAPPED]


class GlobalThatLayersWriteAndRead(Decoder):
    expect, words = REFUSED, r"layers\.\d"

    class block(Block):  # noqa: N801
        def forward(self, x):
            x = super().forward(x)
            return x + _GLOBAL.setdefault("first", x).tanh()

    def forward(self, input_ids):
        _GLOBAL.clear()
        return super().forward(input_ids)


class OutputTappedByAHook(Decoder):
    """A forward hook keeps the first layer's output for the head."""

    expect = EITHER

    def more(self):
        self.layers[0].register_forward_hook(lambda module, args, output: _TAPPED.append(output))

    def forward(self, input_ids):
        _TAPPED.clear()
        x = self.run(self.embed(input_ids))
        return self.finish(x + _TAPPED[0])


class HookThatChangesALayersOutput(Decoder):
    """Steering."""

    def more(self):
        for layer in self.layers:
            layer.register_forward_hook(lambda module, args, output: output * 1.5 + 0.1)


class HookThatChangesALayersInput(Decoder):
    def more(self):
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


class HookThatChangesTheEmbedding(Decoder):
    def more(self):
        self.embed.register_forward_hook(lambda module, args, output: output * 4)


class ForwardReplacedOnTheInstance(Decoder):
    """What replaces it holds on to the module that it was replaced on, not to a copy."""

    expect = EITHER

    def more(self):
        plain = self.layers[1].forward
        self.layers[1].forward = lambda x: plain(x) * 0.5


class CounterThatScales(Decoder):
    """A buffer that every forward advances."""

    expect = EITHER

    def more(self):
        self.register_buffer("calls", torch.zeros(()))

    def run(self, x):
        self.calls += 1
        for layer in self.layers:
            x = layer(x) * (1 + 1 / self.calls)
        return x


class AverageOfAnEarlyHiddenState(Decoder):
    """A buffer that follows the hidden state after the second layer and is subtracted after the last."""

    expect = EITHER

    def more(self):
        self.register_buffer("average", torch.zeros(D))

    def run(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == 0:
                with torch.no_grad():
                    self.average = 0.5 * self.average + 0.5 * x.mean((0, 1))
        return x - self.average


class RunningStatisticsInsideLayers(Decoder):
    in_training = True

    class block(Block):  # noqa: N801
        def __init__(self):
            super().__init__()
            self.batch_norm = nn.BatchNorm1d(D)

        def forward(self, x):
            return self.batch_norm(super().forward(x).transpose(1, 2)).transpose(1, 2)


class StatisticsWithoutGradientOfAnEarlyState(Decoder):
    def run(self, x):
        with torch.no_grad():
            centre = x.mean(1, keepdim=True)
        return super().run(x) - centre


# ---- Recomputation


class CheckpointedLayers(Decoder):
    in_training = True

    def run(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


class CheckpointedLayersReentrant(Decoder):
    """A custom function around each layer: the received hidden state is inside it, out of reach of gradients."""

    in_training = True
    expect, words = REFUSED, "use_reentrant=False"

    def run(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return x


class CheckpointedFunctionsOfLayersAndWhatIsBetween(Decoder):
    in_training = True

    def run(self, x):
        for index in range(DEPTH):
            x = checkpoint(lambda h, i=index: self.layers[i](h) * 0.5, x, use_reentrant=False)
        return x


class CheckpointedSkips(Decoder):
    in_training = True

    def run(self, x):
        x0 = x
        for layer in self.layers:
            x = checkpoint(lambda h, x0, layer=layer: layer(h + x0), x, x0, use_reentrant=False)
        return x


# ---- Positions


class LearnedPositionsOnTheRoot(Decoder):
    def more(self):
        self.places = nn.Parameter(torch.randn(32, D))

    def forward(self, input_ids):
        return self.finish(self.run(self.embed(input_ids) + self.places[: input_ids.shape[1]]))


class LearnedPositionsAddedBeforeEveryLayer(Decoder):
    def more(self):
        self.places = nn.Embedding(32, D)

    def forward(self, input_ids):
        x, places = self.embed(input_ids), self.places(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            x = layer(x + places)
        return self.finish(x)


class SinusoidsFromTheShape(Decoder):
    def run(self, x):
        angle = torch.arange(x.size(1))[:, None] / 100 ** (torch.arange(D) / D)
        return super().run(x + angle.sin().to(x)) + angle.cos().to(x)


class Rotary(nn.Module):
    """Tables that grow on demand and stay on the module."""

    def __init__(self):
        super().__init__()
        self.cos = self.sin = None

    def forward(self, x):
        length, half = x.shape[1], D // HEADS // 2
        if self.cos is None or len(self.cos) < length:
            angle = torch.arange(length)[:, None] / 100 ** (torch.arange(half) / half)
            self.cos, self.sin = angle.cos().to(x), angle.sin().to(x)
        return self.cos[:length], self.sin[:length]


class RotaryTablesResizedOnDemand(Decoder):
    class block(Block):  # noqa: N801
        def forward(self, x, cos, sin):
            def rotate(t):
                a, b = t.chunk(2, -1)
                return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

            return super().forward(x, rotate=rotate)

    def more(self):
        self.rotary = Rotary()

    def run(self, x):
        cos, sin = self.rotary(x)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


class ComplexRotaryTable(Decoder):
    """`freqs_cis`, a complex buffer of the root."""

    class block(Block):  # noqa: N801
        def forward(self, x, table):
            def rotate(t):
                pairs = torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())
                return torch.view_as_real(pairs * table).flatten(-2)

            return super().forward(x, rotate=rotate)

    def more(self):
        half = D // HEADS // 2
        angle = torch.arange(32, dtype=torch.float64)[:, None] / 100 ** (torch.arange(half) / half)
        self.register_buffer("table", torch.polar(torch.ones_like(angle), angle), persistent=False)

    def run(self, x):
        for layer in self.layers:
            x = layer(x, self.table[: x.shape[1]])
        return x


class ComplexNumbersBetweenLayers(Decoder):
    def run(self, x):
        for layer in self.layers:
            x = layer(x)
            x = x + 0.1 * torch.fft.ifft(torch.fft.fft(x, dim=-1) * 1j, dim=-1).real
        return x


# ---- Inputs and outputs


class ArgumentNamedTokens(Decoder):
    def forward(self, tokens):
        return super().forward(tokens)


class ArgumentNamedXUsedLate(Decoder):
    def forward(self, x):
        return self.finish(self.run(self.embed(x)) * (x != PAD)[..., None])


class FeaturesInsteadOfIds(Decoder):
    expect = EITHER

    def more(self):
        self.embed = nn.Linear(5, D)

    def forward(self, features):
        return super().forward(features)

    @staticmethod
    def inputs(ids):
        return ((ids[..., None] * torch.arange(1, 6) / VOCAB).sin().double(),), {}


class DictOfInputs(Decoder):
    expect = EITHER

    def forward(self, batch):
        return super().forward(batch["input_ids"])

    @staticmethod
    def inputs(ids):
        return ({"input_ids": ids},), {}


class PositionsAsAKeyword(Decoder):
    expect = EITHER

    def more(self):
        self.places = nn.Embedding(32, D)

    def forward(self, input_ids, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        places = self.places(position_ids)
        return self.finish(self.run(self.embed(input_ids) + places) + places)

    @staticmethod
    def inputs(ids):
        return (ids,), {"position_ids": torch.arange(ids.shape[1]).flip(0).expand(ids.shape).contiguous()}


class MaskAsAKeyword(Decoder):
    def forward(self, input_ids, attention_mask=None):
        x = self.run(self.embed(input_ids))
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return self.finish(x)

    @staticmethod
    def inputs(ids):
        return (ids,), {"attention_mask": (ids != PAD).long()}


class AdapterThatAKeywordTurnsOn(Decoder):
    def more(self):
        self.adapter = nn.Linear(D, D)

    def forward(self, input_ids, extra=None):
        x = self.embed(input_ids)
        return self.finish(self.run(x if extra is None else x + self.adapter(extra)))


class AdapterThatIsTurnedOn(AdapterThatAKeywordTurnsOn):
    expect = EITHER

    @staticmethod
    def inputs(ids):
        return (ids,), {"extra": (ids[..., None] * torch.arange(1, D + 1) / VOCAB).sin().double()}


class ReturnsADict(Decoder):
    def finish(self, x):
        return {"logits": super().finish(x)}


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class ReturnsADataclass(Decoder):
    def finish(self, x):
        return Output(logits=super().finish(x), hidden=x)


class ReturnsATuple(Decoder):
    def finish(self, x):
        return super().finish(x), x


class ReturnsANamedTuple(Decoder):
    class Result(NamedTuple):
        logits: torch.Tensor
        hidden: torch.Tensor

    def finish(self, x):
        return self.Result(super().finish(x), x)


class ReturnsANestedDict(Decoder):
    expect = EITHER

    def finish(self, x):
        return {"outputs": [{"scores": super().finish(x)}]}


class ReturnsEveryHiddenState(Decoder):
    def forward(self, input_ids):
        states = [self.embed(input_ids)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return self.finish(states[-1]), states


class ReturnsTheLoss(Decoder):
    """Labels go in, a number without a batch dim comes out."""

    expect = EITHER

    def forward(self, input_ids, labels=None):
        logits = super().forward(input_ids)
        if labels is None:
            return logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    @staticmethod
    def inputs(ids):
        return (ids,), {"labels": ids}


class ValueHead(Decoder):
    def more(self):
        self.value = nn.Linear(D, 1)

    def finish(self, x):
        return super().finish(x), self.value(x.detach()).squeeze(-1)


class NoHead(Decoder):
    def more(self):
        del self.head, self.norm

    def finish(self, x):
        return x


# ---- Randomness


class DropoutInsideLayers(Decoder):
    in_training = True

    class block(Block):  # noqa: N801
        def forward(self, x):
            return x + F.dropout(super().forward(x), 0.3, self.training)


class DropoutOnTheEmbedding(Decoder):
    in_training = True

    def more(self):
        self.drop = nn.Dropout(0.3)

    def forward(self, input_ids):
        return self.finish(self.run(self.drop(self.embed(input_ids))))


class DroppedEmbeddingAtTheHead(Decoder):
    """One draw between the units, read on the first and on the last stage."""

    in_training = True
    expect, words = REFUSED, "drawn anew on every stage"

    def forward(self, input_ids):
        x0 = F.dropout(self.embed(input_ids), 0.3, self.training)
        return self.finish(self.run(x0) + x0)


class DroppedMaskOfOnes(Decoder):
    """Variational dropout: one mask for all layers, which depends on no value."""

    expect = EITHER
    in_training = True

    def run(self, x):
        mask = F.dropout(torch.ones_like(x[:, :1]), 0.3, self.training)
        for layer in self.layers:
            x = layer(x) * mask
        return x


class DropoutBetweenLayers(Decoder):
    expect = EITHER
    in_training = True

    def run(self, x):
        for layer in self.layers:
            x = F.dropout(layer(x), 0.3, self.training)
        return x


class DropoutBeforeTheHead(Decoder):
    in_training = True

    def finish(self, x):
        return self.head(F.dropout(self.norm(x), 0.3, self.training))


class NoiseOnTheEmbedding(Decoder):
    """NEFTune."""

    expect = EITHER
    in_training = True

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.finish(self.run(x + 0.1 * torch.rand_like(x)))


class NoiseBetweenLayers(Decoder):
    expect = EITHER
    in_training = True

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
            x = x + 0.1 * torch.randn_like(x)
        return x


class DropPathInsideLayers(Decoder):
    in_training = True

    class block(Block):  # noqa: N801
        def forward(self, x):
            branch = super().forward(x) - x
            return x + branch * (torch.rand_like(branch[:, :1, :1]) < 0.5)


class LayersSkippedByATorchDraw(Decoder):
    """No two stages draw the same, so that being refused is all it can be."""

    expect = EITHER
    in_training = True

    def run(self, x):
        for layer in self.layers:
            if not self.training or torch.rand(()) > 0.3:
                x = layer(x)
        return x


class LayersSkippedByAPythonDraw(Decoder):
    """No two stages draw the same, so that being refused is all it can be."""

    expect = EITHER
    in_training = True

    def run(self, x):
        for layer in self.layers:
            if not self.training or random.random() > 0.3:
                x = layer(x)
        return x


class SkipsByAPythonDrawWhileNotTraining(LayersSkippedByAPythonDraw):
    expect = EXACT
    in_training = False


# ---- What is trained


class FrozenEmbedding(Decoder):
    def more(self):
        self.embed.requires_grad_(False)


class FrozenFirstHalf(Decoder):
    """What the first stage sends needs no gradient."""

    def more(self):
        for module in (self.embed, *self.layers[:3]):
            module.requires_grad_(False)


class EmbeddingWithoutGradientMode(Decoder):
    def forward(self, input_ids):
        with torch.no_grad():
            x = self.embed(input_ids)
        return self.finish(self.run(x))


class OnlyTheHeadIsTrained(Decoder):
    def more(self):
        self.requires_grad_(False)
        self.head.requires_grad_(True)


class OnlyASkipIsTrained(Decoder):
    """The stack is frozen; a gate on the embedding that the head reads is not."""

    def more(self):
        self.requires_grad_(False)
        self.gate = nn.Embedding(VOCAB, D)

    def forward(self, input_ids):
        return self.finish(self.run(self.embed(input_ids)) * self.gate(input_ids))


class ScaledBetweenLayersWhereIdsEnd(Decoder):
    """Code between layers that the first few tokens do not run, and the next batch does."""

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
            if (input_ids == EOS).any():
                x = x * 2
        return self.finish(x)


class ScaledBetweenLayersFromTheSecondForwardOn(Decoder):
    forwards = 0

    def run(self, x):
        self.forwards += 1
        for layer in self.layers:
            x = layer(x)
            if self.forwards > 1:
                x = x * 0.5
        return x


class ScaledBetweenLayersOfLongInputs(Decoder):
    def run(self, x):
        for layer in self.layers:
            x = layer(x)
            if x.shape[1] % 3 == 0:
                x = x * 0.5
        return x


class LengthPaddedAndCutAgain(Decoder):
    """The hidden state has more tokens than the ids where their number is no multiple of eight."""

    expect = EITHER

    def forward(self, input_ids):
        length = input_ids.shape[1]
        x = self.run(F.pad(self.embed(input_ids), (0, 0, 0, -length % 8)))
        return self.finish(x[:, :length])


class BlockThatMayReadIds(Block):
    def forward(self, x, ids):
        x = super().forward(x)
        return x * (1 + (ids % 3)[..., None]) if (x.abs() > 0.01).any() else x


class BranchOnHiddenInsideThatReadsIds(Decoder):
    """A layer that reads the ids only where its own numbers say so."""

    block = BlockThatMayReadIds

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, input_ids)
        return self.finish(x)


class BlockOfChosenTokens(Block):
    def forward(self, x):
        chosen = x.sum(-1, keepdim=True) > 0
        if chosen.any():
            x = x + self.mlp(self.norm2(x)) * chosen
        return x


class LayerThatMayReturnWhatItGot(Decoder):
    """Mixture of depths: chosen tokens pass through the MLP; where none is chosen, the input is the result."""

    block = BlockOfChosenTokens

    def more(self):
        for layer in self.layers:
            del layer.attention, layer.norm1

    def run(self, x):
        for layer in self.layers:
            x = layer(x) * 0.9
        return x


class CountOfIdsByTheSizeOfTheirChoice(Decoder):
    def forward(self, input_ids):
        ends = input_ids[input_ids == EOS].numel()
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x) / (1 + ends)
        return self.finish(x)


class CountOfStatesByAMaskOfIds(Decoder):
    """As models check that the places for images in the text are as many as their features: MiniMax M3."""

    def forward(self, input_ids):
        x = self.embed(input_ids)
        ends = (input_ids == EOS)[..., None].expand_as(x)
        for layer in self.layers:
            x = layer(x) / (1 + x[ends].numel() // D)
        return self.finish(x)


class CountOfStatesByAMaskOfTheirOwn(Decoder):
    expect, words = REFUSED, "reads a number of what"

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x) / (1 + x[x > 0].numel())
        return self.finish(x)


class CountOfIdsByAMaskOfStates(Decoder):
    expect, words = REFUSED, "reads a number of what"

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x) / (1 + input_ids[x[..., 0] > 0].numel())
        return self.finish(x)


class CountOfDistinctRows(Decoder):
    def forward(self, input_ids):
        rows = torch.unique(input_ids % 2, dim=0).shape[0]
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x) / rows
        return self.finish(x)


class ClosenessOfIds(Decoder):
    def forward(self, input_ids):
        x = self.run(self.embed(input_ids))
        near = torch.allclose(input_ids.double(), torch.full_like(input_ids, 5).double(), atol=55)
        return self.finish(x * 2 if near else x)


class MaskKeptForTheNextForward(Decoder):
    expect, words = REFUSED, "reads what an earlier forward left"
    mask = None

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
            if self.mask is not None and self.mask.shape == x.shape:
                x = x * (1 + self.mask)
        self.mask = (x > 0).detach()
        return x


class BufferOfIdsKeptForTheNextForward(Decoder):
    expect = EITHER

    def more(self):
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input_ids):
        x = self.run(self.embed(input_ids))
        seen = self.seen.clone()
        self.seen.copy_(input_ids.double().mean())
        return self.finish(x * (1 + seen / VOCAB))


class BlockWithHook(Block):
    def forward(self, x, first):
        if first.requires_grad:
            first.register_hook(lambda gradient: gradient * 0.5)
        return super().forward(x) + first * 0.1


class HookThatLayersPutOnTheEmbedding(Decoder):
    expect, words = REFUSED, "puts a hook on the gradient"

    block = BlockWithHook

    def forward(self, input_ids):
        first = x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, first)
        return self.finish(x)


class HookForTheBackwardOfALayer(Decoder):
    expect, words = REFUSED, r"layers\.1 .* has a hook for its backward"

    def more(self):
        self.layers[1].register_full_backward_hook(lambda _m, inputs, _o: tuple(g * 0.5 for g in inputs))


class HookBeforeTheForwardOfTheModel(Decoder):
    expect, words = REFUSED, "has hooks of its own"

    def more(self):
        self.register_forward_pre_hook(lambda _m, args: (args[0] % 7,))


class ActivationClosedOverTheModel(Decoder):
    expect, words = REFUSED, "closed over a module"

    def more(self):
        self.activation = lambda x: F.gelu(x) if self.training else x

    def finish(self, x):
        return super().finish(self.activation(x))


class TieByMemory(Decoder):
    expect, words = REFUSED, "two parameters over one memory"

    @classmethod
    def make(cls):
        model = super().make()
        model.head.weight.data = model.embed.weight.data
        return model


class TakesAnything(Decoder):
    expect, words = REFUSED, "does not say what its first input is"

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class BlockThatAsksForAGradient(Block):
    def forward(self, x):
        return super().forward(x if x.requires_grad else x * 0.5)


class LayersThatAskForAGradientOverAFrozenEmbedding(Decoder):
    """In one process the first layer gets no gradient and another scale; what arrives at a stage always needs one."""

    expect, words = REFUSED, "asks whether a tensor requires a gradient"

    block = BlockThatAsksForAGradient

    @classmethod
    def make(cls):
        model = super().make()
        model.embed.requires_grad_(False)
        model.layers[:3].requires_grad_(False)
        return model


class HeadThatAsksForAGradient(Decoder):
    expect, words = REFUSED, "asks whether a tensor requires a gradient"

    def finish(self, x):
        return super().finish(x if x.requires_grad else x * 0.5)


class HookOnAGradientFunction(Decoder):
    """`grad_fn.register_prehook`: seen neither by an operator nor by a method of the tensor."""

    expect, words = REFUSED, "asks whether a tensor requires a gradient"

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
            if x.grad_fn is not None:
                x.grad_fn.register_prehook(lambda gradients: tuple(g * 0.5 for g in gradients))
        return x


class Reversed(torch.autograd.Function):
    """All layers in one function that runs them again in its backward."""

    @staticmethod
    def forward(ctx, x, layers):
        ctx.save_for_backward(x)
        ctx.layers = layers
        for layer in layers:
            x = layer(x)
        return x

    @staticmethod
    def backward(ctx, *gradients):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = y = x.detach().requires_grad_()
            for layer in ctx.layers:
                y = layer(y)
            y.backward(gradients[0])
        return x.grad, None


class LayersInsideAFunctionOfTheirOwn(Decoder):
    """As Reformer's reversible layers: outside, the values between them never had a gradient."""

    expect, words = REFUSED, "crosses the cut inside a custom autograd function"

    def run(self, x):
        return Reversed.apply(x, self.layers)
