"""policy.py: rules by hand, budgets as laws, log-probabilities against brute force over all orders."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refrag.config import POLICIES, Budget
from refrag.errors import InputError
from refrag.policy import (
    MASKED,
    RULES,
    MlpPolicy,
    PolicyInputs,
    TransformerPolicy,
    decide,
    learned_rule,
    learned_scores,
    log_prob,
    sample,
    select,
)


def inputs_of(num_chunks: int = 4, **kwargs) -> PolicyInputs:
    generator = torch.Generator().manual_seed(5)
    defaults = {
        "chunk_embeds": torch.randn(num_chunks, 6, generator=generator),
        "chunk_lengths": torch.full((num_chunks,), 4),
        "passage_index": torch.arange(num_chunks) // 2,
        "question_embeds": torch.randn(6, generator=generator),
    }
    return PolicyInputs(**(defaults | kwargs))


def run(policy, inputs, budget=Budget(), *, base_slots=10, default_fraction=0.5, learned=None):
    return decide(policy, inputs, budget=budget, base_slots=base_slots, default_fraction=default_fraction, learned=learned)


def pick(scores, budget, *, lengths=None, base_slots=0, default_fraction=0.0) -> list[int]:
    lengths = torch.tensor(lengths or [4] * len(scores))
    mask = select(torch.tensor(scores), budget=budget, chunk_lengths=lengths, base_slots=base_slots, default_fraction=default_fraction)
    return mask.nonzero().flatten().tolist()


# ── rules ──


def test_every_policy_of_the_settings_exists():
    assert set(RULES) | {"learned"} == set(POLICIES)


def test_first_expands_from_the_start():
    assert run("first", inputs_of())[0].tolist() == [True, True, False, False]


def test_random_is_seeded():
    masks = [run("random", inputs_of(40, seed=seed))[0] for seed in (1, 1, 2)]
    assert masks[0].equal(masks[1]) and not masks[0].equal(masks[2])
    assert masks[0].sum() == 20


def test_random_is_fair():
    counts = sum(run("random", inputs_of(6, seed=seed), Budget(expand_chunks=3))[0].long() for seed in range(2000))
    assert ((counts / 2000 - 0.5).abs() < 0.05).all()


def test_similarity_by_hand():
    chunks = torch.tensor([[9.0, 1.0], [9.0, -1.0], [9.0, 0.0], [9.0, 0.0]])
    mask, scores = run("similarity", inputs_of(chunk_embeds=chunks, question_embeds=torch.tensor([9.0, -3.0])), Budget(expand_chunks=1))
    assert mask.tolist() == [False, True, False, False]  # the large common part does not hide the difference
    torch.testing.assert_close(scores, torch.tensor([-1.0, 1.0, 0.0, 0.0]))


def test_similarity_of_a_single_chunk():
    assert run("similarity", inputs_of(1), Budget(expand_fraction=1.0))[0].tolist() == [True]


def test_perplexity_high_and_low():
    inputs = inputs_of(perplexity=lambda: torch.tensor([1.0, 4.0, 2.0, 3.0]))
    assert run("perplexity", inputs)[0].tolist() == [False, True, False, True]
    assert run("perplexity-low", inputs)[0].tolist() == [True, False, True, False]


def test_perplexity_is_not_computed_for_other_rules():
    def fail():
        raise AssertionError("computed")

    run("similarity", inputs_of(perplexity=fail))


@pytest.mark.parametrize("policy, missing", [("similarity", "question_embeds"), ("perplexity", "perplexity"), ("perplexity-low", "perplexity")])
def test_rules_say_what_they_need(policy, missing):
    with pytest.raises(InputError, match=r"(needs the question's vector|need the decoder's token probabilities).*choose --policy"):
        run(policy, inputs_of(**{missing: None}))


def test_none_expands_nothing_whatever_the_budget():
    for budget in (Budget(), Budget(expand_fraction=1.0), Budget(expand_chunks=9), Budget(max_slots=1000)):
        assert not run("none", inputs_of(), budget)[0].any()


def test_all_expands_everything_or_says_why_not():
    for budget in (Budget(), Budget(expand_fraction=1.0), Budget(expand_chunks=4), Budget(max_slots=22)):
        assert run("all", inputs_of(), budget)[0].all()
    for budget in (Budget(expand_fraction=0.99), Budget(expand_chunks=3), Budget(max_slots=21)):
        with pytest.raises(InputError, match="'all' expands all 4 chunks, the budget allows 3: leave the budget out, or choose another --policy"):
            run("all", inputs_of(), budget)


def test_a_policy_of_ones_own_may_return_a_list_and_nothing_else():
    assert run(lambda _: [0.0, 2.0, 1.0, 0.0], inputs_of(4), Budget(expand_chunks=1))[0].tolist() == [False, True, False, False]
    for returned in ("abcd", None, [[1.0], [1.0, 2.0]]):
        with pytest.raises(InputError, match=r"A policy must give one number per chunk, gave a \w+ \(.+\): return a tensor or a list of numbers"):
            run(lambda _, given=returned: given, inputs_of(4), Budget(expand_chunks=1))


def test_a_callable_is_a_policy():
    mask, scores = run(lambda inputs: torch.tensor([0.0, 3.0, 1.0, 2.0]), inputs_of(), Budget(expand_chunks=2))
    assert mask.tolist() == [False, True, False, True] and scores.tolist() == [0.0, 3.0, 1.0, 2.0]


def test_bad_policies_are_refused_with_a_sentence():
    with pytest.raises(InputError, match=r"The policy must be one of none, all, .*, learned, was 'best'"):
        run("best", inputs_of())
    with pytest.raises(InputError, match="has no trained policy: choose --policy similarity"):
        run("learned", inputs_of())
    with pytest.raises(InputError, match=r"one score per chunk \(4\), the scores had shape \(3,\)"):
        run(lambda inputs: torch.zeros(3), inputs_of())
    with pytest.raises(InputError, match="must give each chunk a number, NaN was given"):
        run(lambda inputs: torch.tensor([0.0, math.nan, 0.0, 0.0]), inputs_of())


@pytest.mark.parametrize("policy", sorted(RULES))
def test_a_prompt_without_chunks(policy):
    mask, scores = run(policy, inputs_of(0, perplexity=lambda: torch.zeros(0)))
    assert mask.shape == scores.shape == (0,)


# ── budgets ──


def test_fractions_round_down_as_on_paper():
    assert len(pick([0.0] * 100, Budget(expand_fraction=0.29))) == 29  # 0.29 * 100 is 28.999999999999996
    assert len(pick([0.0] * 3, Budget(expand_fraction=1 / 3))) == 1
    assert len(pick([0.0] * 3, Budget(expand_fraction=0.33))) == 0
    assert len(pick([0.0] * 7, Budget(expand_fraction=1.0))) == 7
    assert len(pick([0.0] * 10, Budget(), default_fraction=0.25)) == 2


def test_without_a_budget_one_chunk_is_expanded_at_the_least():
    assert pick([0.0, 2.0, 1.0], Budget(), default_fraction=0.065) == [1]
    assert pick([0.0, 2.0, 1.0], Budget(), default_fraction=0.0) == []
    assert pick([0.0, 2.0, 1.0], Budget(expand_fraction=0.065), default_fraction=0.5) == []


def test_equal_scores_are_taken_in_chunk_order():
    assert pick([1.0, 2.0, 1.0, 2.0, 1.0], Budget(expand_chunks=3)) == [0, 1, 3]


def test_slots_stop_at_the_first_chunk_that_does_not_fit():
    # order 2, 0, 1; costs 3, 5, 0: with 3 free slots chunk 2 fits, chunk 0 does not, and the cheap chunk 1 comes after it
    assert pick([2.0, 1.0, 3.0], Budget(max_slots=23), lengths=[6, 1, 4], base_slots=20) == [2]
    assert pick([2.0, 1.0, 3.0], Budget(max_slots=28), lengths=[6, 1, 4], base_slots=20) == [0, 1, 2]
    assert pick([2.0, 1.0, 3.0], Budget(max_slots=20), lengths=[6, 1, 4], base_slots=20) == []


@pytest.mark.parametrize("policy", ["none", "first", "all"])
def test_a_prompt_over_the_slots_says_by_how_much(policy):
    with pytest.raises(InputError, match=r"takes 30 slots with nothing expanded, 5 more than max_slots 25: raise --max-slots to 30, or read fewer passages with --top-k"):
        run(policy, inputs_of(), Budget(max_slots=25), base_slots=30)


chunk_lists = st.lists(st.tuples(st.integers(1, 16), st.floats(-5, 5, width=16)), max_size=30)


@settings(max_examples=150, deadline=None)
@given(chunks=chunk_lists, base=st.integers(1, 50), spare=st.integers(0, 200))
def test_slots_are_never_exceeded_and_tight(chunks, base, spare):
    lengths, scores = [length for length, _ in chunks], [score for _, score in chunks]
    budget = Budget(max_slots=base + spare)
    expanded = pick(scores, budget, lengths=lengths, base_slots=base) if chunks else []
    slots = base + sum(lengths[i] - 1 for i in expanded)
    assert slots <= base + spare
    order = sorted(range(len(chunks)), key=lambda i: (-scores[i], i))
    assert sorted(order[: len(expanded)]) == expanded  # a prefix of the policy's order …
    if len(expanded) < len(chunks):  # … and the next chunk would not fit
        assert slots + lengths[order[len(expanded)]] - 1 > base + spare


@settings(max_examples=150, deadline=None)
@given(chunks=chunk_lists, fraction=st.floats(0, 1), number=st.integers(0, 40))
def test_shares_and_numbers_are_never_exceeded_and_tight(chunks, fraction, number):
    scores = [score for _, score in chunks]
    if not chunks:
        return
    share = len(pick(scores, Budget(expand_fraction=fraction)))
    assert share <= fraction * len(chunks) + 1e-9 < share + 1
    assert len(pick(scores, Budget(expand_chunks=number))) == min(number, len(chunks))
    best = pick(scores, Budget(expand_chunks=number))
    rest = set(range(len(chunks))) - set(best)
    assert min((scores[i] for i in best), default=9) >= max((scores[i] for i in rest), default=-9)


# ── log-probabilities ──


def test_log_prob_by_hand():
    logits = torch.log(torch.tensor([1.0, 2.0, 3.0]))
    expected = torch.log(torch.tensor([3 / 6, 1 / 3, 2 / 2]))
    torch.testing.assert_close(log_prob(logits, torch.tensor([2, 0, 1])), expected)


def stepwise(logits: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The paper's definition, word for word: mask what was picked, renormalise, take the pick's log-probability."""
    penalty = torch.zeros_like(logits)
    steps = []
    for index in order:
        steps.append(torch.log_softmax(logits - penalty, dim=-1)[index])
        penalty = penalty.clone()
        penalty[index] = math.inf
    return torch.stack(steps)


@pytest.mark.parametrize("num", [1, 2, 3, 5])
def test_log_prob_equals_the_papers_definition_over_all_orders(num):
    logits = torch.tensor([0.3, -2.0, 4.0, 1.1, 0.0], dtype=torch.float64)
    total = 0.0
    for order in itertools.permutations(range(5), num):
        got = log_prob(logits, torch.tensor(order))
        torch.testing.assert_close(got, stepwise(logits, order))
        total += got.sum().exp().item()
    assert total == pytest.approx(1.0)


@pytest.mark.parametrize("num", [2, 4])
def test_gradients_equal_those_of_the_definition(num):
    order = (3, 0, 2, 1)[:num]
    fast, slow = (torch.tensor([0.5, -1.0, 2.0, 30.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    log_prob(fast, torch.tensor(order)).sum().backward()
    stepwise(slow, order).sum().backward()
    torch.testing.assert_close(fast.grad, slow.grad)


def test_extreme_and_padded_logits_stay_finite():
    logits = torch.tensor([[900.0, -900.0, 0.0, MASKED, MASKED]], requires_grad=True)
    result = log_prob(logits, torch.tensor([[0, 2, 1]]))
    assert result.tolist() == [[0.0, 0.0, 0.0]]
    result.sum().backward()
    assert logits.grad.isfinite().all()


def test_padding_picks_count_nothing():
    logits = torch.randn(2, 4)
    whole = log_prob(logits, torch.tensor([[1, 0, 2], [3, -1, -1]]))
    torch.testing.assert_close(whole[0], log_prob(logits[0], torch.tensor([1, 0, 2])))
    torch.testing.assert_close(whole[1, 0], torch.log_softmax(logits[1], -1)[3])
    assert whole[1, 1:].tolist() == [0.0, 0.0]


def test_samples_follow_their_own_probabilities():
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    indices, log_probs = sample(logits.expand(40000, 4), 2, generator=generator)
    assert (indices[:, 0] != indices[:, 1]).all()
    for order in itertools.permutations(range(4), 2):
        share = (indices == torch.tensor(order)).all(-1).float().mean().item()
        assert share == pytest.approx(stepwise(logits, order).sum().exp().item(), abs=0.01)
    torch.testing.assert_close(log_probs[0], stepwise(logits, tuple(indices[0].tolist())))


def test_samples_never_hold_padding():
    logits = torch.tensor([[1.0, 2.0, 3.0, MASKED, MASKED, MASKED]]).expand(500, 6)
    indices, log_probs = sample(logits, 3, generator=torch.Generator().manual_seed(0))
    assert indices.max() == 2 and log_probs.isfinite().all()


def test_zero_picks():
    indices, log_probs = sample(torch.randn(3, 4), 0)
    assert indices.shape == log_probs.shape == (3, 0)


# ── learned policies ──

LEARNED = {
    "mlp": lambda aware: MlpPolicy(6, 16, question_aware=aware),
    "transformer": lambda aware: TransformerPolicy(6, 16, num_layers=2, num_heads=4, question_aware=aware),
}


@pytest.fixture(params=[(kind, aware) for kind in LEARNED for aware in (False, True)], ids=lambda p: f"{p[0]}-{'question' if p[1] else 'blind'}")
def policy(request):
    torch.manual_seed(0)
    kind, aware = request.param
    return LEARNED[kind](aware).eval()


def test_padding_changes_no_logit(policy):
    chunks, question = torch.randn(2, 5, 6), torch.randn(2, 6)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    passages = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    chunks[1, 3:] = 1e3  # whatever stands in the padding
    batch = policy(chunks, mask, question_embeds=question, passage_index=passages)
    alone = policy(chunks[1:, :3], mask[1:, :3], question_embeds=question[1:], passage_index=passages[1:, :3])
    torch.testing.assert_close(batch[1, :3], alone[0], atol=1e-5, rtol=1e-5)
    assert batch[1, 3:].tolist() == [pytest.approx(MASKED, rel=1e-6)] * 2 and batch.dtype == torch.float32


def test_no_mask_is_a_mask_without_padding(policy):
    chunks, mask, question, passages = torch.randn(2, 9, 6), torch.ones(2, 9, dtype=torch.bool), torch.randn(2, 6), torch.tensor([[0] * 4 + [1] * 5] * 2)
    with torch.inference_mode():
        masked, unmasked = (policy(chunks, given, question_embeds=question, passage_index=passages) for given in (mask, None))
    torch.testing.assert_close(unmasked, masked, atol=1e-5, rtol=1e-5)


def test_question_is_seen_only_where_it_should_be(policy):
    chunks, mask = torch.randn(1, 5, 6), torch.ones(1, 5, dtype=torch.bool)
    first, second = (policy(chunks, mask, question_embeds=torch.randn(1, 6)) for _ in range(2))
    assert first.equal(second) != policy.question_aware
    if policy.question_aware:
        with pytest.raises(InputError, match="looks at the question, no question vector was given"):
            policy(chunks, mask)


def test_every_weight_gets_a_gradient(policy):
    chunks, mask = torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.bool)
    logits = policy.train()(chunks, mask, question_embeds=torch.randn(2, 6), passage_index=torch.tensor([[0, 0, 1, 1, 2]] * 2))
    log_prob(logits, torch.tensor([[0, 3], [4, 1]])).sum().backward()
    for name, parameter in policy.named_parameters():
        if name not in ("logit.bias", "layers.layers.0.self_attn.in_proj_bias", "layers.layers.1.self_attn.in_proj_bias"):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name  # a softmax sees no common offset


def test_learned_policy_decides_and_takes_the_top(policy):
    inputs = inputs_of(6, passage_index=torch.tensor([0, 0, 1, 1, 2, 2]))
    mask, scores = run("learned", inputs, Budget(expand_chunks=2), learned=policy)
    assert mask.nonzero().flatten().tolist() == sorted(scores.topk(2).indices.tolist())
    assert not scores.requires_grad
    half = policy.to(torch.bfloat16)
    assert run("learned", inputs, Budget(expand_chunks=2), learned=half)[0].sum() == 2


def test_prompts_are_scored_together_as_alone(policy):
    given = [inputs_of(count, question_embeds=torch.full((6,), float(count))) for count in (4, 1, 5, 7, 20, 4)] + [inputs_of(0, question_embeds=torch.ones(6))]
    together = learned_scores(policy, given)
    for inputs, scores in zip(given, together, strict=True):
        torch.testing.assert_close(scores, learned_rule(policy)(inputs), rtol=1e-5, atol=1e-5)


def test_learned_policy_without_chunks_or_question(policy):
    assert run("learned", inputs_of(0), learned=policy)[0].shape == (0,)
    if policy.question_aware:
        with pytest.raises(InputError, match="looks at the question, no question vector was given"):
            learned_rule(policy)(inputs_of(question_embeds=None))


def test_transformer_knows_order_and_passages():
    torch.manual_seed(0)
    policy = TransformerPolicy(6, 16, question_aware=False).eval()
    chunks, mask = torch.randn(1, 4, 6), torch.ones(1, 4, dtype=torch.bool)
    one = policy(chunks, mask, passage_index=torch.tensor([[0, 0, 0, 0]]))
    two = policy(chunks, mask, passage_index=torch.tensor([[0, 0, 1, 1]]))
    assert not torch.allclose(one, two)
    assert torch.equal(one, policy(chunks, mask))
    same = policy(chunks[:, :1].expand(1, 4, 6), mask)
    assert not torch.allclose(same[0, 0], same[0, 1])


def test_a_policy_learns_which_chunks_pay():
    """REINFORCE with `sample` finds the chunks whose first number is large, in a few steps."""
    torch.manual_seed(0)
    policy = TransformerPolicy(6, 16, question_aware=False)
    optimizer, generator = torch.optim.Adam(policy.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    mask = torch.ones(64, 8, dtype=torch.bool)
    for _ in range(120):
        chunks = torch.randn(64, 8, 6, generator=generator)
        indices, log_probs = sample(policy(chunks, mask), 2, generator=generator)
        reward = chunks[..., 0].gather(1, indices).mean(1)
        optimizer.zero_grad()
        (-(reward - reward.mean())[:, None] * log_probs).mean().backward()
        optimizer.step()
    chunks = torch.randn(64, 8, 6, generator=generator)
    picked = policy.eval()(chunks, mask).topk(2).indices
    assert chunks[..., 0].gather(1, picked).mean() > 0.8  # at random 0; the best possible is about 1.1
