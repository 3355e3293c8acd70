"""The arithmetic of stages, tested without processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from am_pipeline import calculate_virtual_stages, generate_hf_model_fqn_per_model_part, stage_ids_this_rank


@given(pp_size=st.integers(1, 16), per_rank=st.integers(1, 6))
def test_loop_placement_gives_every_stage_to_exactly_one_rank(pp_size, per_rank):
    total = pp_size * per_rank
    held = [stage_ids_this_rank(rank, pp_size, total) for rank in range(pp_size)]
    assert sorted(stage for stages in held for stage in stages) == list(range(total))
    assert all(list(stages) == sorted(stages) for stages in held)
    assert all(stage % pp_size == rank for rank, stages in enumerate(held) for stage in stages)


@given(pp_size=st.integers(1, 16))
def test_v_placement_turns_around_at_the_last_rank(pp_size):
    held = [stage_ids_this_rank(rank, pp_size, 2 * pp_size, "v") for rank in range(pp_size)]
    assert held[0] == (0, 2 * pp_size - 1)
    assert held[-1] == (pp_size - 1, pp_size)
    assert sorted(stage for stages in held for stage in stages) == list(range(2 * pp_size))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 2, 4, "spiral"), "'loop' or 'v'"),
        ((0, 2, 3, "loop"), "multiple of pp_size=2"),
        ((2, 2, 4, "loop"), "pp_rank must be in"),
        ((0, 2, 6, "v"), "two stages per rank"),
        ((0, 2, 0, "loop"), "multiple of pp_size=2"),
    ],
)
def test_a_wrong_placement_is_refused_with_what_is_allowed(arguments, words):
    with pytest.raises(ValueError, match=words):
        stage_ids_this_rank(*arguments)


@given(
    layers=st.integers(1, 200),
    per_stage=st.none() | st.integers(-1, 40),
    pp_size=st.integers(1, 16),
    single=st.booleans(),
    rounding=st.sampled_from([None, "up", "down"]),
)
def test_virtual_stages_fit_the_schedule_or_are_refused(layers, per_stage, pp_size, single, rounding):
    try:
        total, per_rank = calculate_virtual_stages(layers, per_stage, pp_size, single, rounding)
    except ValueError:
        return
    assert total == per_rank * pp_size
    assert 1 <= total <= layers
    assert per_rank == 1 if single else per_rank >= 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((8, 0, 2, True, None), "layers_per_stage must be at least 1"),
        ((8, 4, 2, True, "sideways"), "round_to_pp_multiple"),
        ((8, 3, 2, False, None), "round_to_pp_multiple='up'"),
        ((3, None, 2, False, None), "more than there are layers"),
        ((8, 2, 2, True, None), "one stage per rank"),
        ((8, 4, 2, False, None), "at least two"),
    ],
)
def test_stages_that_do_not_fit_are_refused_with_the_nearest_fix(arguments, words):
    with pytest.raises(ValueError, match=words):
        calculate_virtual_stages(*arguments)


def test_rounding_moves_the_stage_count_to_a_multiple_of_the_axis():
    assert calculate_virtual_stages(12, 3, 3, False, "up") == (6, 2)
    assert calculate_virtual_stages(12, 1, 5, False, "down") == (10, 2)


@given(layers=st.integers(1, 100), stages=st.integers(1, 100))
def test_generated_names_cover_every_layer_once_in_order_and_evenly(layers, stages):
    if stages > layers:
        with pytest.raises(ValueError, match="between 1 and the number of layers"):
            generate_hf_model_fqn_per_model_part(stages, layers)
        return
    names = generate_hf_model_fqn_per_model_part(stages, layers, include_multimodal_encoders=False)
    held = [[n for n in stage if ".layers." in n] for stage in names]
    assert [n for stage in held for n in stage] == [f"model.layers.{i}" for i in range(layers)]
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert "model.embed_tokens" in names[0]
    assert {"model.norm", "lm_head"} <= set(names[-1])
    assert all("model.rotary_emb" in stage for stage in names)


def test_generated_names_follow_their_arguments():
    names = generate_hf_model_fqn_per_model_part(
        2,
        2,
        include_embeddings=False,
        include_lm_head=False,
        include_rotary_emb=False,
        include_multimodal_encoders=False,
        extra_module_fqns=["adapter"],
        fqn_prefix="decoder.",
        lm_head_fqn="head",
    )
    assert names == [["decoder.layers.0", "adapter"], ["decoder.layers.1", "decoder.norm"]]
