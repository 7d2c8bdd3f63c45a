"""The suites that there are; importing this registers them."""

from symbiotic_titan.evaluation.suite import SUITES
from symbiotic_titan.evaluation.suites.clip_score import CLIP_SCORE
from symbiotic_titan.evaluation.suites.fid import FID
from symbiotic_titan.evaluation.suites.lm_eval import LM_EVAL
from symbiotic_titan.evaluation.suites.ocrbench import OCRBENCH
from symbiotic_titan.evaluation.suites.prompts import (
    GENEVAL_IMAGES,
    T2I_COMPBENCH_IMAGES,
)

for suite in (
    CLIP_SCORE,
    FID,
    GENEVAL_IMAGES,
    LM_EVAL,
    OCRBENCH,
    T2I_COMPBENCH_IMAGES,
):
    SUITES.register(suite.name, suite)
