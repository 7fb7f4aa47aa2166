#!/usr/bin/env bash
# Host paths -> container paths, in the form that both Pyxis and docker take: SOURCE:TARGET:FLAGS, separated by commas.
# Sourced by run.sub after its checks. EXTRA_MOUNTS appends more of the same form, such as a site's NCCL plugin.
export CONT_MOUNTS="${DATADIR}:/data:ro,${MODEL}:/ckpt:ro,${LOGDIR}:/results:rw"
export CONT_MOUNTS="${CONT_MOUNTS},${TREE}:/workspace/ft-llm:ro" # this tree, so that config, scripts and code are one version
export CONT_MOUNTS="${CONT_MOUNTS}${EXTRA_MOUNTS:+,${EXTRA_MOUNTS}}"
