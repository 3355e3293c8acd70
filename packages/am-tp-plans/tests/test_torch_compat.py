"""The private parts of torch that am-tp-plans stands on are where they were."""

from __future__ import annotations

import copy

from torch import nn

from am_tp_plans._torch_compat import hook_dicts


def test_a_copy_with_empty_hook_dicts_has_no_hooks():
    calls = []
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    module.register_forward_hook(lambda *_, **__: calls.append("post"), with_kwargs=True, always_call=True)
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    twin = copy.deepcopy(module, {id(hooks): type(hooks)() for hooks in hook_dicts(module)})
    twin(twin.weight).sum().backward()
    assert not calls
    module(module.weight).sum().backward()
    assert calls == ["pre", "post", "backward"]
