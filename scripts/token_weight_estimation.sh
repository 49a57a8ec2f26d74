#!/usr/bin/env bash
# Token weights for TIS-DPO from two contrastive models, as the TIS-DPO repository names them:
#   MODEL_NAME_1  run or model folder trained on the pairs as they are (positive)
#   MODEL_NAME_2  run or model folder trained on the reversed pairs (negative)
# Reads datasets/ultra-feedback and writes generated-data/ultra-feedback-tisdpo. Options of train.py
# may follow and win: bash scripts/token_weight_estimation.sh datasets=[my-data] weights.batch_size=8
set -euo pipefail
: "${MODEL_NAME_1:?set it to the folder of the model trained on the pairs as they are}"
: "${MODEL_NAME_2:?set it to the folder of the model trained on the reversed pairs}"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "${PYTHON:-python}" -u "$here/train.py" task=estimate_weights trainer=FSDPTrainer \
  model=blank_model model.name_or_path="$MODEL_NAME_1" \
  model.fsdp_policy_mp=null weights.positive="$MODEL_NAME_1" weights.negative="$MODEL_NAME_2" \
  datasets=[ultra-feedback] base_data_dir=datasets \
  weights.output_dir=generated-data weights.suffix=-tisdpo "$@"
