"""One small evaluation for the tests of protocols."""

from __future__ import annotations

import pytest

from evaluations import make_evaluation
from medssl.pipelines.cells import Evaluation


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Return two inits on ten made-up patients, with masks and classes."""
    return make_evaluation(tmp_path_factory.mktemp("evaluation"))
