"""Messages that carry what each of several microbatches sends, in one form."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from am_pipeline.cut.messages import messages_of
from am_pipeline.cut.provenance import Value

sizes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
# What a microbatch sends beside the hidden state: values of two units, of shapes of their own.
microbatches = st.lists(
    st.lists(st.tuples(st.sampled_from(["tower", "adapter"]), sizes), max_size=4), min_size=1, max_size=4
)


@given(microbatches)
def test_what_is_unpacked_is_what_was_packed_and_its_gradient_comes_back(drawn):
    sent = []
    for values in drawn:
        named = [(Value("layer", 0, 0), ((2, 3), torch.float64))]
        named += [(Value(unit, 0, leaf), (shape, torch.float64)) for leaf, (unit, shape) in enumerate(values)]
        sent.append(named)
    messages = messages_of(sent)
    assert len({message.slots for message in messages}) == 1
    for message, named in zip(messages, sent, strict=True):
        tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for _, (shape, dtype) in named]
        slots = message.pack(tensors)
        assert [(tuple(slot.shape), slot.dtype) for slot in slots] == list(message.slots)
        assert all(slot.requires_grad for slot in slots)  # a backward in two passes asks of all that was sent
        received = [slot.detach().requires_grad_() for slot in slots]
        unpacked = message.unpack(received)
        for own, arrived in zip(tensors, unpacked, strict=True):
            assert torch.equal(own, arrived)
        torch.autograd.backward(unpacked, [own.detach() for own in unpacked])
        torch.autograd.backward(slots, [slot.grad for slot in received])
        assert all(torch.equal(own.grad, own.detach()) for own in tensors)


def test_microbatches_that_send_the_same_send_nothing_more():
    hidden = (Value("layer", 0, 0), ((2, 3), torch.float32))
    mask = (Value("embed", 0, 1), ((2, 3), torch.bool))
    (message, again) = messages_of([[hidden, mask], [hidden, mask]])
    assert message == again
    tensors = [torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)]
    assert all(a is b for a, b in zip(message.pack(tensors), tensors, strict=True))
    assert all(a is b for a, b in zip(message.unpack(tensors), tensors, strict=True))
