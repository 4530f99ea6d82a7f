# What bash does with processes: jobs, traps, here-documents, substitutions, coprocesses.
set -u
trap 'echo "exit trap $?"' EXIT
x=$(echo one; echo two); echo "[$x]"
echo "nested $(echo "$(echo "$(echo deep)")")"
cat <<END
here $((1 + 2)) $(echo sub) $x
END
cat <<'END' | tr a-z A-Z
quoted $x
END
cat <<< "string"
(exit 3); echo "subshell $?"
false | true; echo "pipe ${PIPESTATUS[*]}"
set -o pipefail; false | true; echo "pipefail $?"; set +o pipefail
f() { local v=$1; [ "$v" -le 0 ] || { echo -n "$v "; f $((v - 1)); }; }; f 5; echo
sleep 0.05 & a=$!; (exit 7) & b=$!; wait $b; echo "b $?"; wait $a; echo "a $?"
for i in 1 2 3; do (sleep 0.0$i; exit $i) & done; n=0; while wait -n; [ $? -ne 127 ]; do n=$((n + 1)); done; echo "waited for $n"
trap 'echo usr1' USR1; kill -USR1 $$; kill -USR1 $BASHPID
trap 'echo chld' CHLD; (exit 0) & wait $!; trap - CHLD
bash -c 'trap "echo term; exit 9" TERM; kill -TERM $$; echo not reached'; echo "trapped $?"
{ bash -c 'kill -KILL $$'; echo "killed $?"; } 2>/dev/null
bash -c 'trap "" INT; kill -INT $$; echo ignored'
coproc { while read -r line; do echo "co: $line"; done; }
echo hello >&"${COPROC[1]}"; read -r reply <&"${COPROC[0]}"; echo "$reply"; eval "exec ${COPROC[1]}>&-"; wait "$COPROC_PID"; echo "coproc $?"
diff <(printf '1\n2\n') <(printf '1\n3\n'); echo "diff $?"
while read -r a b; do echo "$b $a"; done < <(printf '1 2\n3 4\n')
mapfile -t lines < <(seq 1 5); echo "${#lines[@]} ${lines[4]}"
declare -A map=([k]=v [l]=w); for k in k l; do echo "$k=${map[$k]}"; done
exec 3> three; echo to three >&3; exec 3>&-; cat three
set -m; sleep 100 & jobs > list; sed 's/  */ /g' list; rm list; kill %1; wait %1 2>/dev/null; echo "job $?"; set +m
(ulimit -n 64; ulimit -n)
time_format() { TIMEFORMAT='%0lR'; { time sleep 0.01; } 2>&1 | grep -c s; }; time_format
printf '%s\n' "$0" "$#" "${BASH_VERSINFO[0]}"
cd /tmp && pwd && cd - > /dev/null
umask 077; : > masked; stat -c %a masked
read -r -t 0.05 nothing < <(sleep 1); echo "timed out $(($? > 128))"
echo "$(<three)"; type -t cd; command -v sh; hash -r
exec 4< three; read -r first <&4; echo "$first"; exec 4<&-
( set -e; false; echo never ); echo "set -e $?"
trap 'echo dbg' DEBUG; :; trap - DEBUG
bash -c 'exit 300'; echo "300 is $?"
no-such-command 2>/dev/null; echo "missing $?"
/etc/passwd 2>/dev/null; echo "not executable $?"
exit 42
