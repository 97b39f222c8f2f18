"""Where parameters lie under FSDP2, by tiny modules on a group of one or two ranks."""

import sys

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lplb_triton.integrations._fsdp import find_lasting_memory
from lplb_triton.training.slot_memory import extend_memory


class Rows(torch.nn.Module):
    """A module with rows of weights, which notes in its forward pass where they lie."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.arange(8.0, dtype=dtype).view(4, 2))
        self.found, self.extended = None, None
        self.register_forward_pre_hook(self.look)

    def look(self, module, args):
        """Find the memory, and extend it once."""
        self.found = find_lasting_memory(self)
        if self.found and self.extended is None:
            tensor, announce = self.found["rows"]
            self.extended = extend_memory(tensor, 1)
            announce()

    def forward(self, x):
        """Multiply by the weights."""
        return x @ self.rows.T


def make_mesh(group):
    """Make a mesh of a group of its own, since torch keeps a mesh's group for good."""
    return DeviceMesh.from_group(dist.new_group(list(range(group.size()))), "cpu")


def train(model, x):
    """Make one step that lowers every weight by one, and return the output before it."""
    output = model(x)
    output.sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.zero_grad()
    return output.detach()


def test_plain_parameters_stay_where_they_are():
    """Without FSDP the parameter itself is found, and trains in its new memory."""
    model = Rows()
    train(model, torch.ones(1, 2))
    assert model.found["rows"].tensor is model.rows
    assert torch.equal(model.extended[:4], torch.arange(8.0).view(4, 2) - 1)
    assert torch.equal(model(torch.ones(1, 2))[0], model.extended[:4].sum(1))


def check_whole_shards(rank, group):
    """Check a module that FSDP manages on one rank alone."""
    mesh = make_mesh(group)
    model = fully_shard(Rows(), mesh=mesh)
    x = torch.ones(1, 2)
    first = train(model, x)
    assert torch.equal(first, torch.tensor([[1.0, 5.0, 9.0, 13.0]]))
    assert torch.equal(model.extended[:4], torch.arange(8.0).view(4, 2) - 1)
    # FSDP gathers from the new memory, so that the next pass sees the step.
    assert torch.equal(model(x), first - 2)
    assert model.found["rows"].tensor.data_ptr() == model.extended.data_ptr()


def test_whole_shards_are_found_and_stay_in_use(tmp_path):
    """A shard that one rank has to itself is found, and FSDP reads from where it was moved."""
    run_ranks(check_whole_shards, 1, tmp_path)


def check_gathered_parameters(rank, group):
    """Check modules whose parameters FSDP puts together in memory of its own."""
    mesh = make_mesh(group)
    sharded = fully_shard(Rows(), mesh=mesh)
    inside = fully_shard(torch.nn.Sequential(Rows()), mesh=mesh)
    for model in (sharded, inside):
        train(model, torch.ones(1, 2))
    assert sharded.found == {} and inside[0].found == {}


def test_gathered_parameters_are_left_alone(tmp_path):
    """What FSDP gathers is not taken for lasting, nor what it manages for a parent."""
    run_ranks(check_gathered_parameters, 2, tmp_path)


@pytest.mark.parametrize("missing", ["_composable_state", "_module_state_mapping"])
def test_unknown_torch_is_left_alone(monkeypatch, missing):
    """Where torch doesn't tell which modules FSDP manages, no memory is taken for lasting."""
    states = "torch.distributed._composable_state"
    if missing == "_composable_state":
        monkeypatch.setitem(sys.modules, states, None)
    else:
        monkeypatch.delattr(sys.modules[states], missing)
    assert find_lasting_memory(Rows()) == {}
