"""What a task, a method, an aggregation rule or a messenger of your own must do, as checks for your
tests: each raises `Nonconforming`, whose message says everything that is missing.

from fedsp.testing import check_task

def test_it_is_a_task():
    check_task(TRUE_OR_FALSE, [{"statement": "Water is wet.", "true": True}])
"""

from fedsp.testing.faults import Nonconforming
from fedsp.testing.messengers import check_messenger
from fedsp.testing.methods import check_method
from fedsp.testing.rules import check_rule
from fedsp.testing.tasks import check_task

__all__ = ["Nonconforming", "check_messenger", "check_method", "check_rule", "check_task"]
