#!/usr/bin/env bash
# Quantize a model and check the result against quality gates.
#
#     quantize.sh MODEL OUTPUT        MODEL: a model folder with calibration or activations beside it
#
# The environment may set the variables below; their defaults stand there. The exit code is that of
# the first command that did not end with 0: 3 is a missed gate. The reports are written in any case,
# under REPORTS: *.xml for the build server, *.json for programs. After an interruption the same
# command goes on.
set -euo pipefail

model=${1:?which model? quantize.sh MODEL OUTPUT}
output=${2:?where to? quantize.sh MODEL OUTPUT}
: "${BITS:=4}" "${GROUP_SIZE:=128}" "${FORMAT:=compressed-tensors}" "${RUNTIME:=vllm}"
: "${MIN_GAIN:=1.5}" "${MAX_REL_ERR:=0.02}" "${MAX_FALLBACKS:=0}"
: "${TOKENS:=}" "${MAX_KL:=0.02}"    # TOKENS: a .npy of tokens that the calibration has not seen
: "${REPORTS:=reports}"
mkdir -p "$REPORTS"

# --require-calibration: no silent run without calibration. --force: an older output may be there.
ptq gptq "$model" --bits "$BITS" --group-size "$GROUP_SIZE" --format "$FORMAT" \
    --require-calibration --force --output "$output" \
    --junit "$REPORTS/quantize.xml" --json >"$REPORTS/quantize.json"

# Measured anew from the files, not from what the run believed.
gates=(--min-gain "$MIN_GAIN" --max-rel-err "$MAX_REL_ERR" --max-fallbacks "$MAX_FALLBACKS")
if [ -n "$TOKENS" ]; then
    gates+=(--tokens "$TOKENS" --max-kl "$MAX_KL")
fi
status=0
ptq eval "$model" "$output" "${gates[@]}" \
    --junit "$REPORTS/eval.xml" --json >"$REPORTS/eval.json" || status=$?

# Will the runtime load it? Asked also where a gate was missed.
ptq check "$output" --runtime "$RUNTIME" || status=$((status ? status : $?))

exit "$status"
