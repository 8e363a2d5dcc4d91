"""Carrying batch norms between torch, nnx, linen, Haiku, Equinox, explicit layers and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from files import CHANNELS, WRITERS, linen_variables, nnx_model, random_states, torch_model
from flax import nnx
from tolerances import rtol_of

from batchnorm.jax import BatchNorm as OursNnx
from batchnorm.tools import transfer
from batchnorm.tools.checkpoints import read_checkpoint
from batchnorm.tools.models import take_state
from batchnorm.torch import BatchNorm, BatchNorm2d
from batchnorm.torch.explicit import BatchNorm as Explicit
