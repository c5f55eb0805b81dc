"""Request traces: public formats and our own in, one frozen value out; standard library only.

A trace says when requests arrive and how long they are, never what they contain. Both modes
replay the same `Trace`.
"""

from gllm.trace.arrivals import Arrivals, parse_arrivals
from gllm.trace.errors import TraceError
from gllm.trace.formats import FORMATS
from gllm.trace.load import load_trace
from gllm.trace.options import TraceOptions
from gllm.trace.request import Trace, TraceRequest
from gllm.trace.samples import Sample, list_samples
from gllm.trace.write import trace_lines, write_trace

__all__ = [
    "FORMATS",
    "Arrivals",
    "Sample",
    "Trace",
    "TraceError",
    "TraceOptions",
    "TraceRequest",
    "list_samples",
    "load_trace",
    "parse_arrivals",
    "trace_lines",
    "write_trace",
]
