use super::define_rows;
use super::words::*;

const SHM: Disposition = GoHome(HomeReason::SharedMemory);
/// `IPC_NOWAIT`.
const NOWAIT: u64 = 0o4000;

define_rows! {
    29 shmget(key: INT, size: SIZE, shmflg: INT) Forward, note: "The segment is at home; attaching to it makes the process go there.";
    30 shmat(shmid: INT, addr: ADDR, shmflg: INT) SHM;
    31 shmctl(shmid: INT, cmd: INT, buf: Sub(SubTable::Shmctl)) Forward, note: "By command: see below.";
    64 semget(key: INT, nsems: INT, semflg: INT) Forward;
    65 semop(semid: INT, sops: inp(Count(2, 6)), nsops: UINT) Forward, blocking: Long;
    66 semctl(semid: INT, semnum: INT, cmd: INT, arg: Sub(SubTable::Semctl)) Forward, note: "By command: see below.";
    67 shmdt(addr: ADDR) SHM;
    68 msgget(key: INT, msgflg: INT) Forward;
    69 msgsnd(msqid: INT, msgp: inp(Plus(2, 8)), msgsz: SIZE, msgflg: INT) Forward, blocking: Long, quick: &[has(3, NOWAIT)];
    70 msgrcv(msqid: INT, msgp: out(Plus(2, 8)).ret_plus(8).early(), msgsz: SIZE, msgtyp: LONG, msgflg: INT) Forward,
        blocking: Long, quick: &[has(4, NOWAIT)];
    71 msgctl(msqid: INT, cmd: INT, buf: Sub(SubTable::Msgctl)) Forward, note: "By command: see below.";
    220 semtimedop(semid: INT, sops: inp(Count(2, 6)), nsops: UINT, timeout: TIME_IN.timeout()) Forward, blocking: Long;
    240 mq_open(name: PATH, oflag: INT, mode: MODE, attr: inp(Fixed(64))) Forward;
    241 mq_unlink(name: PATH) Forward;
    242 mq_timedsend(mqdes: FD, msg: inp(Arg(2)), len: SIZE, prio: UINT, timeout: TIME_IN) Forward, blocking: Long;
    243 mq_timedreceive(mqdes: FD, msg: out(Arg(2)).ret(1).early(), len: SIZE, prio: out(Fixed(4)).early(), timeout: TIME_IN) Forward, blocking: Long;
    244 mq_notify(mqdes: FD, sevp: Kind::MqNotify) Forward;
    245 mq_getsetattr(mqdes: FD, new: inp(Fixed(64)), old: out(Fixed(64))) Forward;
}
