#!/usr/bin/env bash
# What run.sub writes to and reads from the logs of trials; run.sub sources this. Only functions.

mllog() { # event_type key value metadata
  printf ':::MLLOG {"namespace": "", "time_ms": %s, "event_type": "%s", "key": "%s", "value": %s, "metadata": %s}\n' \
    "$(date +%s%3N)" "$@"
}

# Both streams to the screen and to the end of a file. The status is the command's: tee is not part of a pipeline, and
# signals that stop the command leave it alone, so that the last lines are kept.
log_to() { # file COMMAND...
  local status=0 out tee_pid patience=50
  exec {out}> >(
    trap '' INT TERM USR1
    exec tee -a "$1"
  )
  tee_pid=$!
  "${@:2}" >&"${out}" 2>&1 || status=$?
  exec {out}>&-
  # A process that outlived the command may hold the pipe open: tee gets five seconds to see its end
  while kill -0 "${tee_pid}" 2>/dev/null && ((patience-- > 0)); do sleep 0.1; done
  kill -KILL "${tee_pid}" 2>/dev/null || true
  return "${status}"
}

# What no rank could write: a run that began and has no end gets `run_stop` with status aborted; a line that was cut in the
# middle is made plain text, so that the log parses. Fails where the disk does not take that.
close_log() { # log reason
  [[ -f "$1" ]] || return 0
  end_last_line "$1"
  sed -i 's/:::MLLOG \(.*[^}[:space:]]\)[[:space:]]*$/cut off: \1/' "$1" 2>/dev/null || true # a full disk: no cut line is left
  if ! grep -q ':::MLLOG .*"run_start"' "$1" || grep -q ':::MLLOG .*"run_stop"' "$1"; then
    return 0
  fi
  if mllog INTERVAL_END run_stop null "{\"file\": \"run.sub\", \"lineno\": ${LINENO}, \"status\": \"aborted\"}" 2>/dev/null >>"$1"; then
    say "$2: run_stop (aborted) written for it" | tee -a "$1" || end_last_line "$1"
  else
    end_last_line "$1"
    complain "$1: run_stop (aborted) could not be written; is the disk full?"
  fi
  return 1
}

# A disk that is full takes no line end: then the cut line goes
end_last_line() { # file
  [[ -n "$(tail -c 1 "$1")" ]] || return 0
  echo 2>/dev/null >>"$1" || truncate -s "-$(tail -n 1 "$1" | wc -c)" "$1"
}

# A log that its own job called finished holds the status; any other is of a run that was cut off
finished_status() { # log
  sed -n 's/^run.sub: trial [0-9]* finished with status \([0-9]*\):.*/\1/p' "$1" 2>/dev/null | tail -n 1
}

set_aside() { # log
  [[ -f "$1" ]] || return 0
  close_log "$1" "run cut off" || true
  local now env="${1%.log}.env"
  now="$(date +%s)"
  [[ ! -f "${env}" ]] || mv "${env}" "${env}.interrupted_${now}"
  mv "$1" "$1.interrupted_${now}"
}

# srun returns the status of ranks that it ended itself: look for that of the one which failed first
first_failure() { # log, srun's status
  local own
  own="$(sed -n 's/^srun: error: .*: tasks\{0,1\} .*: Exited with exit code \([1-9][0-9]*\)$/\1/p' "$1" | head -n 1)"
  echo "${own:-$2}"
}
