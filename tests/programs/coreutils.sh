# Pipelines of coreutils and friends, with every kind of redirection.
set -u
export LC_ALL=C
seq 1 20000 | sort -R --random-source=<(yes) | sort -n | uniq | wc -l
seq 1 5000 | awk '{ s += $1 * $1 } END { print s }'
yes abcdefgh | head -c 3000000 | md5sum
seq 1 1000 | tac | head -3 | tr '\n' ' ' ; echo
mkdir -p tree/a/b/c tree/d
for i in $(seq 1 30); do echo "file $i" > "tree/a/f$i"; done
cp -a tree copy && diff -r tree copy && echo same
find tree -type f | sort | head -5
find tree -name 'f1*' -print0 | sort -z | xargs -0 -n2 -P2 cat | sort
ln -s a/f1 tree/link && ln tree/a/f2 tree/hard && stat -c '%F %h %s' tree/link tree/hard
mv tree/a/f3 tree/d/ && rm tree/a/f4 && ls tree/a | wc -l
chmod 640 tree/a/f5 && stat -c %a tree/a/f5
du -a --apparent-size tree/d | sort
echo appended >> tree/a/f1 && cat tree/a/f1
cat < tree/a/f1 > out 2>&1
cat missing 2>err; echo "status $?"; cat err
{ echo to-out; echo to-err >&2; } 2>&1 >both | sed 's/^/err: /'; cat both
exec 5<>rw && echo five >&5 && cat rw && exec 5>&-
printf '%s\n' b a c | tee t1 t2 | sort > t3; cmp t1 t2; paste t1 t3
split -b 1000 -d <(seq 1 1000) part. && cat part.* | cksum
dd if=/dev/zero of=zero bs=64K count=40 2>/dev/null && stat -c %s zero && truncate -s 10M zero && sha256sum zero
comm -12 <(seq 1 2 20) <(seq 1 3 20 | sort) 2>/dev/null; join <(echo 1 a) <(echo 1 b)
expr 6 \* 7; date -u -d @86400 +%F; basename /a/b.c .c; dirname /a/b/c; factor 1234567890
timeout 0.2 sleep 10; echo "timeout $?"
nice -n 5 nice; env -i A=1 env; nohup true < /dev/null > /dev/null 2>&1; echo $?
od -An -tx1 <<< hello; base64 <<< hello; rev <<< hello; fold -w3 <<< abcdefg; nl <<< one
test -p /dev/stdin < <(true) && echo pipe; [ -t 0 ] || echo no tty
sleep 0.05 & wait $!; echo "waited $?"
mkfifo pipe && (echo through > pipe &) && cat pipe
ls -l /proc/self/fd/ | wc -l
readlink -f tree/link | sed "s,$PWD,.,"
sort -u --parallel=2 <(seq 1 50000) <(seq 25000 75000) | wc -l
