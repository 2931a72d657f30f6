"""The code of a registered model: MLflow copies this file into the model, and runs it there."""

from medssl.pipelines.serving import load
from medssl.tracking.pyfunc import serve

serve(load)
