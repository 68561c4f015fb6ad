"""One round of Flower's SecAgg+ (flwr 1.41.0) in this process: its client mod and its server workflow, no network.

Both are Flower's own code, driven as its runtime drives them, but for what carries messages: requests are copied, as
clients change them, and replies are passed on as they are. Its strategy does nothing: each result that the workflow
hands it holds the mean already.
"""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from types import SimpleNamespace

import numpy as np

from primia_lite.config import UserError

WANTED = "1.41.0"
# SecAggPlusWorkflow's defaults.
SETTINGS = {"clipping_range": 8.0, "quantization_range": 2**22, "modulus_range": 2**32}


def check() -> None:
    """Raise UserError unless this flwr is installed."""
    try:
        found = metadata.version("flwr")
    except metadata.PackageNotFoundError:
        found = "none"
    if found != WANTED:
        raise UserError(f'flwr {WANTED} is needed, found: {found}; install it: pip install -e ".[flower]"')


def round_of(
    vectors: Mapping[int, np.ndarray],
    sizes: Mapping[int, int],
    threshold: int,
    client: Callable[[int, Callable], object],
    server: Callable[[Callable], object],
) -> tuple[np.ndarray, dict[int, int]]:
    """The mean as float64 [L], and the bytes that each client sent.

    Parameters
    ----------
    vectors, sizes
        float32 [L], and the number of examples, by client.
    client, server
        Call what they are given, for a client or the server: so that a caller can time parties.
    """
    warnings.filterwarnings("ignore")
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.client.mod.secure_aggregation.secaggplus_mod import secaggplus_mod
    from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters
    from flwr.compat.common import recorddict_compat as compat
    from flwr.server.compat.legacy_context import LegacyContext
    from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
    from flwr.server.workflow.constant import Key as WorkflowKey
    from flwr.server.workflow.secure_aggregation.secaggplus_workflow import SecAggPlusWorkflow
    from flwr.supercore.task_identity import TaskIdentity

    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    contexts = {i: Context(1, i, {}, RecordDict(), {}) for i in vectors}
    sent, numbers = dict.fromkeys(vectors, 0), itertools.count(1)
    # What training would have left: not part of the protocol, so made before.
    results = {
        i: FitRes(Status(Code.OK, ""), ndarrays_to_parameters([vector]), sizes[i], {}) for i, vector in vectors.items()
    }

    def trained(message, context):
        return Message(compat.fitres_to_recorddict(results[context.node_id], True), reply_to=message)

    class Grid:
        def send_and_receive(self, messages, *, timeout=None):
            replies = []
            for message in messages:
                node = message.metadata.dst_node_id
                message.metadata.__dict__["_message_id"] = str(next(numbers))
                message.content = copy.deepcopy(message.content)
                reply = client(node, lambda m=message, n=node: secaggplus_mod(m, contexts[n], trained))
                sent[node] += _size(reply.content)
                replies.append(reply)
            return replies

    strategy = SimpleNamespace(
        configure_fit=lambda *_: [
            (SimpleNamespace(node_id=i), FitIns(ndarrays_to_parameters([np.zeros(1, np.float32)]), {})) for i in vectors
        ],
        aggregate_fit=lambda number, results, failures: (results[0][1].parameters, {}),
    )
    manager = SimpleNamespace(num_available=lambda: len(vectors))
    context = LegacyContext(Context(1, 1, {}, RecordDict(), {}), strategy=strategy, client_manager=manager)
    start = ndarrays_to_parameters([np.zeros(1, np.float32)])
    context.state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(start, True)
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    workflow = SecAggPlusWorkflow(len(vectors), threshold, max_weight=float(sum(sizes.values())), **SETTINGS)
    server(lambda: workflow(Grid(), context))
    (mean,) = context.state.array_records[MAIN_PARAMS_RECORD].to_numpy_ndarrays()
    if mean.shape != next(iter(vectors.values())).shape:
        raise UserError("Flower's workflow halted before its end")
    return mean, sent


def _size(content) -> int:
    """Bytes of the values in a message, names and framing left out."""
    values = itertools.chain(*(record.values() for record in content.config_records.values()))
    flat = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in values)
    return sum(len(v) if isinstance(v, (bytes, str)) else 8 for v in flat)
