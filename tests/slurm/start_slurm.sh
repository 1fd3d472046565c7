#!/usr/bin/env bash
# A whole Slurm on this machine: munged, slurmctld and two slurmd on localhost, each of which is a node with all of the
# machine's cores, with all that they write in one folder. The partitions main and urgent have the first, two has both.
#
#   tests/slurm/start_slurm.sh FOLDER      prints the line to export: SLURM_CONF=FOLDER/slurm.conf
#   tests/slurm/stop_slurm.sh FOLDER
#
# Needs root, and Debian's slurm-wlm and munge, which it installs where apt-get can. Where it cannot run it says why and
# exits with 77. A second call with the same folder finds everything running and changes nothing.
set -euo pipefail

folder=${1:?usage: start_slurm.sh FOLDER}
cannot() { echo "Slurm cannot run here: $1" >&2; exit 77; }

[ "$(id -u)" = 0 ] || cannot "it needs root"
if ! command -v slurmctld slurmd munged sbatch > /dev/null; then
    command -v apt-get > /dev/null || cannot "there is no slurmctld, slurmd or munged, and no apt-get to install them"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; } > /dev/null 2>&1 \
        || cannot "apt-get could not install slurm-wlm and munge"
fi

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
mkdir -p "$folder"/{state,munge}
host=$(hostname -s)
second=localhost  # a name that resolves: processes look for the first node of their job by it

# munge insists on its own user and on folders that nobody else may write to; its socket has a short name in any case.
if [ ! -f "$folder/munge/key" ]; then
    dd if=/dev/urandom of="$folder/munge/key" bs=128 count=1 status=none
    mktemp -d /tmp/munge.XXXXXX > "$folder/munge_socket_folder"
fi
socket_folder=$(cat "$folder/munge_socket_folder")
mkdir -p "$socket_folder"
chmod 755 "$socket_folder"
cp "$folder/munge/key" "$socket_folder/key"
chmod 600 "$socket_folder/key"

# Ports of this Slurm's own, so that another one on the machine is left alone.
[ -f "$folder/port" ] || echo $((20000 + $$ % 20000)) > "$folder/port"
port=$(cat "$folder/port")

cat > "$folder/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is queued again waits until its old credentials have expired: 2 minutes by default.
AuthInfo=socket=$socket_folder/socket,cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=3
MinJobAge=3600
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=$(getconf _NPROCESSORS_ONLN) State=UNKNOWN
NodeName=$second NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=$(getconf _NPROCESSORS_ONLN) State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=3
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=two Nodes=$host,$second MaxTime=INFINITE State=UP PriorityTier=1
CONF

alive() { [ -f "$1" ] && kill -0 "$(cat "$1")" 2> /dev/null; }

alive "$socket_folder/munged.pid" || munged --force --num-threads=2 --key-file="$socket_folder/key" \
    --socket="$socket_folder/socket" --pid-file="$socket_folder/munged.pid" \
    --log-file="$socket_folder/munged.log" --seed-file="$socket_folder/seed" > "$folder/munged.out" 2>&1
export SLURM_CONF="$folder/slurm.conf"
alive "$folder/slurmctld.pid" || slurmctld > "$folder/slurmctld.out" 2>&1
for node in "$host" "$second"; do
    alive "$folder/slurmd.$node.pid" || slurmd -N "$node" > "$folder/slurmd.$node.out" 2>&1
done

for _ in $(seq 60); do
    if [ "$(sinfo --noheader --partition=two --format=%t 2> /dev/null)" = idle ]; then
        echo "export SLURM_CONF=$SLURM_CONF"
        exit 0
    fi
    sleep 0.5
done
tail -n 5 "$folder"/*.out "$folder"/*.log >&2 || true
"$(dirname "$0")/stop_slurm.sh" "$folder"
cannot "the nodes did not become idle within 30 seconds (see above)"
