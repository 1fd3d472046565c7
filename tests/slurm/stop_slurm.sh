#!/usr/bin/env bash
# Ends the Slurm that start_slurm.sh began in FOLDER, with all its jobs. Does nothing where none runs.
#
#   tests/slurm/stop_slurm.sh FOLDER
set -uo pipefail

folder=${1:?usage: stop_slurm.sh FOLDER}
[ -f "$folder/slurm.conf" ] || exit 0
export SLURM_CONF="$folder/slurm.conf"
socket_folder=$(cat "$folder/munge_socket_folder")

alive() { [ -f "$1" ] && kill -0 "$(cat "$1")" 2> /dev/null; }

if alive "$folder/slurmctld.pid"; then
    scancel --quiet --full --signal=KILL --user=root > /dev/null 2>&1
    scancel --quiet --user=root > /dev/null 2>&1
    for _ in $(seq 60); do
        [ -z "$(squeue --noheader 2> /dev/null)" ] && break
        sleep 0.5
    done
fi
for pid in "$folder"/slurmd.*.pid "$folder/slurmctld.pid" "$socket_folder/munged.pid"; do
    alive "$pid" || continue
    number=$(cat "$pid")
    kill "$number"
    for _ in $(seq 40); do
        kill -0 "$number" 2> /dev/null || break
        sleep 0.25
    done
    kill -9 "$number" 2> /dev/null
done
rm -rf "$socket_folder"
exit 0
