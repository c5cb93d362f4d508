"""Runs an artifact directory with ONNX Runtime, the way the original model is called. Nothing here needs torch."""

from __future__ import annotations

from vlmopt.runtime.answering import Answer, Answering, Request, answered
from vlmopt.runtime.generation import Timing
from vlmopt.runtime.latency import Latency, LatencyTable, Ratio, measure_latency
from vlmopt.runtime.model import Model, load
from vlmopt.runtime.sampling import Sampling
from vlmopt.runtime.session import Session, check_files, open_session

__all__ = [
    "Answer",
    "Answering",
    "Latency",
    "LatencyTable",
    "Model",
    "Ratio",
    "Request",
    "Sampling",
    "Session",
    "Timing",
    "answered",
    "check_files",
    "load",
    "measure_latency",
    "open_session",
]
