# Sourced at the end of a batch script: runs the ranks, watches how they end, and does what rewarm.launch.attempt decides.
# The batch script sets
#   run         the run folder, absolute
#   submission  name of its folder in $run/slurm
#   again       no | requeue | chain: what happens after a time limit
#   python      array: a Python that has rewarm's dependencies (inside the container, if there is one)
#   launch      array: srun with its options, and the container's if there is one
#   train       array: the command of one rank

ask() { "${python[@]}" -m rewarm.launch.attempt "$@" --run "$run" --submission "$submission"; }

# Signals reach the ranks by themselves: those save and stop. This script stays to see how they end.
trap : TERM INT HUP USR1 USR2

answer=$(ask begin) || exit 1
eval "$answer"
if [ "$next" = run ]; then
    export MASTER_PORT REWARM_ERROR_FOLDER
    # Since 22.05 srun no longer takes this from the job.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    # A copy of srun's own messages: they say which task failed first, and how.
    "${launch[@]}" "${train[@]}" 2> >(trap '' TERM INT HUP USR1 USR2; exec tee "$REWARM_ERROR_FOLDER/srun" >&2) &
    ranks=$!
    wait $ranks
    status=$?
    while kill -0 $ranks 2>/dev/null; do # a signal interrupted the wait
        wait $ranks
        status=$?
    done
    state=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -oE '\b(JobState|Reason)=[^ ]*' | tr '\n' ' ')
    answer=$(ask end --status "$status" --job-state "$state" --again "$again") || exit 1
    eval "$answer"
fi

# Nodes that SLURM would still give us if it avoided those in $1.
count_without() {
    sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --states=idle,allocated,mixed,completing --format=%N |
        sort -u | grep -vxFf <(scontrol show hostnames "$1") | wc -l
}

case $next in
requeue)
    # What was excluded before stays so.
    before=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -oP '\bExcNodeList=\K[^ ]+' | grep -v null)
    [ -z "$exclude" ] || exclude+=${before:+,$before}
    if [ -n "$exclude" ] && [ "$(count_without "$exclude")" -lt "$SLURM_JOB_NUM_NODES" ]; then
        echo "rewarm: too few other nodes to avoid $exclude" >&2
        exclude=
    fi
    trap '' TERM # from here on SLURM ends this script and what it calls
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        echo "rewarm: SLURM refuses to requeue this job: submit again, with --chain instead of --until-done" >&2
        exit 1
    fi
    # Only a job that waits can be told which nodes to avoid.
    [ -z "$exclude" ] || scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$exclude"
    ;;
give_up)
    [ -z "${rest:-}" ] || scancel --quiet $rest
    ;;
esac
exit "$status"
