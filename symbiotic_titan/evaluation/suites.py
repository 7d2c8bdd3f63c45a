"""The suites that there are; importing this registers them."""

from symbiotic_titan.evaluation.clip_score_suite import CLIP_SCORE
from symbiotic_titan.evaluation.demo_suite import DEMO_WORLD
from symbiotic_titan.evaluation.fid_suite import FID
from symbiotic_titan.evaluation.lm_eval_suite import LM_EVAL
from symbiotic_titan.evaluation.ocrbench_suite import OCRBENCH
from symbiotic_titan.evaluation.prompt_suites import GENEVAL_IMAGES, T2I_COMPBENCH_IMAGES
from symbiotic_titan.evaluation.suite import SUITES

for suite in (
    CLIP_SCORE,
    DEMO_WORLD,
    FID,
    GENEVAL_IMAGES,
    LM_EVAL,
    OCRBENCH,
    T2I_COMPBENCH_IMAGES,
):
    SUITES.register(suite.name, suite)
