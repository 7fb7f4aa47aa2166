#!/usr/bin/env bash
# A Slurm cluster on one Debian machine, for tests: slurmctld, munge and NODES slurmd's, as root, without systemd or cgroups. Each
# node has its own network, UTS, PID and mount namespace: host name, addresses, /dev/shm and the NODE_LOCAL folders differ.
#   cluster.sh up | down | stop_node K | start_node K
# RIG       state folder, which other users must be able to enter; up makes it anew
# NODES     2
# SPANK     a line of plugstack.conf
# NODE_LOCAL  folders that every node has its own of
# PYTHON_HOME SITE TRANSFORMER_ENGINE  the interpreter's folder, site-packages and the folder beside them: appear on the nodes
#                   as /run/l2ltest/{python,site,transformer_engine}, as a user
#                   who is not root may not enter /root
set -euo pipefail

readonly RIG="${RIG:?}" NODES="${NODES:-2}" NET=10.213.77 BRIDGE=l2lbr0 SPACE=l2ltest
readonly NODE_LOCAL="/run/l2ltest-tmp ${NODE_LOCAL:-}" # the first one: TmpFS, which mpi/pmix wants to differ per node
export SLURM_CONF="${RIG}/etc/slurm.conf"

# ---- up --------------------------------------------------------------------------------------------------------------

up() {
  umask 022
  rm -rf "${RIG}"
  mkdir -p "${RIG}"/{etc,run,log,state,nodes}
  write_configuration
  head -c 1024 /dev/urandom >"${RIG}/etc/munge.key"
  chmod 400 "${RIG}/etc/munge.key"
  munged --force --key-file="${RIG}/etc/munge.key" --socket="${RIG}/run/munge.sock" --pid-file="${RIG}/run/munged.pid" \
    --log-file="${RIG}/log/munged.log" --seed-file="${RIG}/run/munge.seed" --num-threads=2
  ip link show "${BRIDGE}" >/dev/null 2>&1 || ip link add "${BRIDGE}" type bridge
  ip addr replace "${NET}.254/24" dev "${BRIDGE}"
  ip link set "${BRIDGE}" up
  slurmctld -f "${SLURM_CONF}"
  local k
  for ((k = 1; k <= NODES; k++)); do start_node "${k}"; done
  for ((k = 0; k < 300; k++)); do
    [[ "$(sinfo -h -N -t idle -o %N | wc -l)" != "${NODES}" ]] || return 0
    sleep 0.1
  done
  sinfo -Nl >&2
  return 1
}

write_configuration() {
  local k
  {
    cat <<C
ClusterName=tests
SlurmctldHost=$(hostname)(${NET}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=${RIG}/run/munge.sock
CredType=cred/munge
SlurmctldPort=6917
SlurmctldPidFile=${RIG}/run/slurmctld.pid
SlurmctldLogFile=${RIG}/log/slurmctld.log
StateSaveLocation=${RIG}/state
SlurmdPidFile=${RIG}/run/slurmd.%n.pid
SlurmdLogFile=${RIG}/log/slurmd.%n.log
SlurmdSpoolDir=${RIG}/nodes/%n/spool
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TmpFS=${NODE_LOCAL%% *}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
GresTypes=gpu
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_min_interval=100000,batch_sched_delay=0
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
PropagateResourceLimits=NONE
KillWait=5
MinJobAge=86400
MessageTimeout=30
JobRequeue=1
PlugStackConfig=${RIG}/etc/plugstack.conf
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP
C
    for ((k = 1; k <= NODES; k++)); do
      echo "NodeName=node${k} NodeAddr=${NET}.${k} Port=6818 CPUs=8 RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
    done
  } >"${SLURM_CONF}"
  printf 'Name=gpu File=%s\n' /dev/null /dev/zero >"${RIG}/etc/gres.conf" # any devices
  printf '%s\n' "${SPANK:-}" >"${RIG}/etc/plugstack.conf"
  {
    printf '127.0.0.1 localhost\n%s.254 %s\n' "${NET}" "$(hostname)"
    for ((k = 1; k <= NODES; k++)); do echo "${NET}.${k} node${k}"; done
  } >"${RIG}/etc/hosts"
}

start_node() { # number
  local space="${SPACE}$1"
  ip netns del "${space}" 2>/dev/null || true
  ip link del "v${space}" 2>/dev/null || true
  ip netns add "${space}"
  # A node that comes back has its old hardware address, or the others' ARP entries would lead nowhere
  ip link add "v${space}" type veth peer name eth0 address "02:00:00:00:00:0$1" netns "${space}"
  ip link set "v${space}" master "${BRIDGE}" up
  ip -n "${space}" link set lo up
  ip -n "${space}" link set eth0 up
  ip -n "${space}" addr add "${NET}.$1/24" dev eth0
  # nsenter, as `ip netns exec` would mount another /sys
  setsid nsenter --net="/run/netns/${space}" \
    unshare --uts --mount --pid --fork --kill-child --mount-proc --propagation private \
    "${BASH_SOURCE[0]}" node_init "node$1" </dev/null >"${RIG}/log/init.node$1.log" 2>&1 &
  echo $! >"${RIG}/run/node.node$1.pid"
}

# What runs as process 1 of a node, and reaps its orphans
node_init() { # name
  local folder own="${RIG}/nodes/$1"
  mkdir -p "${own}/spool"
  hostname "$1"
  echo "$1" >"${own}/hostname"
  mount --bind "${own}/hostname" /etc/hostname
  mount --bind "${RIG}/etc/hosts" /etc/hosts
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  for folder in ${NODE_LOCAL}; do
    mkdir -p "${own}/local${folder}" "${folder}"
    chmod 1777 "${own}/local${folder}"
    mount --bind "${own}/local${folder}" "${folder}"
  done
  mkdir -p /run/l2ltest
  mount -t tmpfs tmpfs /run/l2ltest
  mkdir /run/l2ltest/{python,site,transformer_engine}
  mount --bind "${PYTHON_HOME:?}" /run/l2ltest/python
  mount --bind "${SITE:?}" /run/l2ltest/site
  mount --bind "${TRANSFORMER_ENGINE:?}" /run/l2ltest/transformer_engine
  trap 'kill -TERM "${daemon}" 2>/dev/null' TERM
  slurmd -D -f "${SLURM_CONF}" -N "$1" &
  daemon=$!
  wait "${daemon}" || wait "${daemon}" || true
}

# ---- down ------------------------------------------------------------------------------------------------------------

running() { [[ -r "/proc/$1/status" ]] && ! grep -q '^State:[[:space:]]*Z' "/proc/$1/status"; }

stop() { # pid file, word that the command line must hold
  local pid
  pid="$(cat "$1" 2>/dev/null)" || return 0
  rm -f "$1"
  running "${pid}" && tr '\0' ' ' <"/proc/${pid}/cmdline" | grep -q -- "$2" || return 0
  kill -KILL "${pid}"
  while running "${pid}"; do sleep 0.05; done
}

stop_node() { # number; everything on it dies at once, as when its power fails
  stop "${RIG}/run/node.node$1.pid" node_init
  ip link del "v${SPACE}$1" 2>/dev/null || true
  ip netns del "${SPACE}$1" 2>/dev/null || true
}

down() {
  local k
  stop "${RIG}/run/slurmctld.pid" slurmctld
  for ((k = 1; k <= NODES; k++)); do stop_node "${k}"; done
  stop "${RIG}/run/munged.pid" munged
  ip link del "${BRIDGE}" 2>/dev/null || true
}

"$@"
