use super::sub_rows;
use crate::syscall::kind::SubRow;
use crate::syscall::table::words::*;

/// `struct semid64_ds`.
const SEM: u32 = 104;
/// `struct msqid64_ds`.
const MSG: u32 = 120;
/// `struct shmid64_ds`.
const SHM: u32 = 112;

/// `semctl` by command.
pub(super) const SEMCTL: &[SubRow] = sub_rows! {
    0 IPC_RMID() Forward;
    1 IPC_SET(buf: inp(Fixed(SEM))) Forward;
    2 IPC_STAT(buf: out(Fixed(SEM))) Forward;
    3 IPC_INFO(buf: out(Fixed(40))) Forward;
    11 GETPID() Forward;
    12 GETVAL() Forward;
    13 GETALL(array: ADDR) GoHome(HomeReason::Opaque) => "The size of the array is known to the set alone.";
    14 GETNCNT() Forward;
    15 GETZCNT() Forward;
    16 SETVAL(value: INT) Forward;
    17 SETALL(array: ADDR) GoHome(HomeReason::Opaque) => "The size of the array is known to the set alone.";
    18 SEM_STAT(buf: out(Fixed(SEM))) Forward;
    19 SEM_INFO(buf: out(Fixed(40))) Forward;
    20 SEM_STAT_ANY(buf: out(Fixed(SEM))) Forward;
};

/// `msgctl` by command.
pub(super) const MSGCTL: &[SubRow] = sub_rows! {
    0 IPC_RMID() Forward;
    1 IPC_SET(buf: inp(Fixed(MSG))) Forward;
    2 IPC_STAT(buf: out(Fixed(MSG))) Forward;
    3 IPC_INFO(buf: out(Fixed(32))) Forward;
    11 MSG_STAT(buf: out(Fixed(MSG))) Forward;
    12 MSG_INFO(buf: out(Fixed(32))) Forward;
    13 MSG_STAT_ANY(buf: out(Fixed(MSG))) Forward;
};

/// `shmctl` by command.
pub(super) const SHMCTL: &[SubRow] = sub_rows! {
    0 IPC_RMID() Forward;
    1 IPC_SET(buf: inp(Fixed(SHM))) Forward;
    2 IPC_STAT(buf: out(Fixed(SHM))) Forward;
    3 IPC_INFO(buf: out(Fixed(72))) Forward;
    11 SHM_LOCK() Forward;
    12 SHM_UNLOCK() Forward;
    13 SHM_STAT(buf: out(Fixed(SHM))) Forward;
    14 SHM_INFO(buf: out(Fixed(48))) Forward;
    15 SHM_STAT_ANY(buf: out(Fixed(SHM))) Forward;
};
