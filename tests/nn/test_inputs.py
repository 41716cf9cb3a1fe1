"""What encoders see of data."""

import torch
from head_specs import F64, SPECS

import pyro_vae.nn as nn


def test_input_layers():
    x = torch.tensor([[0.0, 4.0, 16.0]])
    torch.testing.assert_close(nn.Binomial(16).input_layer()(x), x / 16)
    pixels = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    torch.testing.assert_close(nn.DiscretizedLogistic(256).input_layer()(pixels), torch.tensor([[-1.0, -0.6, 1.0]]))
    for name, spec in SPECS.items():
        if spec.innermost == "Normal" or name in ("Bernoulli", "ContinuousBernoulli"):
            assert spec.make().input_layer()(x) is x


def test_one_hot_input_has_the_layout_of_the_raw_numbers():
    """Logits that are large where the input layer says one: every class is predicted from itself."""
    for event_dim, shape in ((1, (5, 3)), (3, (5, 2, 4, 3))):
        head = nn.Categorical(4, event_dim=event_dim)
        x = torch.randint(4, shape)
        seen = head.input_layer()(x)
        assert seen.shape == (5, 4 * shape[1], *shape[2:])
        torch.testing.assert_close(head(200 * seen).log_prob(x), torch.zeros(5))


def test_one_hot_of_values_that_are_no_class_is_zero():
    """They have no density either: the head refuses them."""
    assert nn.OneHot(3)(torch.tensor([-1, 3])).tolist() == [0] * 6


def test_inputs_follow_the_type_of_the_module_and_leave_no_state():
    for layer in (nn.Scale(0.5), nn.OneHot(3)):
        assert layer.double()(torch.tensor([1, 2])).dtype == F64
        assert not layer.state_dict()
