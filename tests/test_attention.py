"""Attention over packed segments against attention over each sequence alone, in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref.attention import attention_problem, build_attention, choose_attention
from fastpref.attention_kernels import attend_varlen
from fastpref.batch import EncodedRow, PackedBatch
from fastpref.packing import pack_rows

