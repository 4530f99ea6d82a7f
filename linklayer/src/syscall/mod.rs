//! The system calls of x86_64: one table that says what each is and where it runs, and the marshalling that follows
//! from it.
//!
//! On the node where a guest is, the supervisor asks [`resolve`] where a call runs. To forward one it calls
//! [`gather`], which copies the arguments out of guest memory into a [`CallRequest`]; the deputy lays that out in a
//! slot ([`place`]), lets the vessel's thread make the call, and copies the results back ([`collect`]); the supervisor
//! puts them into guest memory ([`Gathered::scatter`]).
//!
//! A pointer that the guest could not follow itself is replaced by one that the vessel cannot follow either, so that
//! the home kernel decides which error comes first. What cannot be copied exactly makes the process go home.

mod builder;
mod content;
mod gather;
mod home;
mod kind;
mod message;
mod print;
mod request;
pub mod sub;
mod table;
mod terminal;
mod transfer;
mod vector;

pub use content::content_of;
pub use gather::{BODY_MAX, GatherError, Gathered, gather};
pub use kind::{
    Actual, Arg, Blocking, Buf, CacheClass, Cmp, Dir, Disposition, HomeReason, Kind, Row, Rule, Scalar, Size,
    SplitKind, SubRow, When,
};
pub use print::{format_call, markdown, text};
pub use request::{
    Area, CallRequest, CallView, Malformed, Out, OutLen, OutWhen, Place, Reloc, Reply, SLOT_DATA_LEN, Target,
    collect, place,
};
pub use table::{LATEST, groups, row, rows};
pub use terminal::{TerminalUse, terminal_use};
pub use transfer::{Step, Transfer};

/// What the table says about one particular call.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// The call's row; `None` if the table has none.
    pub row: Option<&'static Row>,
    /// The command's row, for a call that has a sub-table and a command that is in it.
    pub sub: Option<&'static SubRow>,
    /// Where this call runs.
    pub disposition: Disposition,
    /// How long it may take at home.
    pub blocking: Blocking,
    /// What the result depends on, if it may be kept and given again for the same arguments.
    pub cache: Option<CacheClass>,
    kinds: [Option<Kind>; 6],
    /// Registers beyond the declared arguments are passed on: the kernel may insist on their value.
    raw_rest: bool,
}

impl Call {
    /// What argument `index` is; `None` for a register that the call does not use.
    pub fn kind(&self, index: usize) -> Option<Kind> {
        self.kinds.get(index).copied().flatten()
    }
}

/// Looks a call up, its command and its exceptions included. A call that is not in the table goes home.
pub fn resolve(nr: u32, args: &[u64; 6]) -> Call {
    let mut call = Call {
        row: None,
        sub: None,
        disposition: Disposition::GoHome(HomeReason::UnknownCall),
        blocking: Blocking::Long,
        cache: None,
        kinds: [None; 6],
        raw_rest: false,
    };
    let Some(row) = row(nr) else { return call };
    call.row = Some(row);
    call.disposition = row.disposition;
    call.blocking = row.blocking;
    // The session of another process may change without our seeing it.
    call.cache = row
        .cache
        .filter(|&class| class != CacheClass::Session || args[0] as u32 == 0);
    for (index, arg) in row.args.iter().enumerate() {
        if let Kind::Sub(table) = arg.kind {
            call.raw_rest = true;
            call.sub = table.find(args);
            match call.sub {
                Some(sub) => {
                    call.disposition = sub.disposition;
                    call.blocking = sub.blocking;
                    for (kind, arg) in call.kinds[index..].iter_mut().zip(sub.args) {
                        *kind = Some(arg.kind);
                    }
                }
                None => call.disposition = Disposition::GoHome(HomeReason::UnknownCommand),
            }
        } else {
            call.kinds[index] = Some(arg.kind);
        }
    }
    if let Some(rule) = row
        .rules
        .iter()
        .find(|rule| rule.when.iter().all(|cmp| cmp.holds(args)))
    {
        call.disposition = rule.then;
    }
    if row.quick.iter().any(|cmp| cmp.holds(args)) {
        call.blocking = Blocking::Never;
    }
    call
}

/// When a filter may let a call run on this node without asking anybody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalRule {
    /// Whatever its arguments are.
    Always,
    /// When all conditions of one of these lists hold.
    When(Vec<Vec<Cmp>>),
    /// Not at all.
    Never,
}

/// The part of the table that a filter needs. Agrees with [`resolve`] giving [`Disposition::Local`].
pub fn local_rule(row: &Row) -> LocalRule {
    let mut lists: Vec<Vec<Cmp>> = Vec::new();
    for rule in row.rules.iter().filter(|rule| rule.then == Disposition::Local) {
        lists.push(rule.when.to_vec());
    }
    for arg in row.args {
        if let Kind::Sub(table) = arg.kind {
            lists.extend(
                table
                    .rows()
                    .iter()
                    .filter(|s| s.disposition == Disposition::Local)
                    .map(|s| table.cmps(s)),
            );
        }
    }
    let by_command = row.args.iter().any(|arg| matches!(arg.kind, Kind::Sub(_)));
    if !by_command
        && row.disposition == Disposition::Local
        && row.rules.iter().all(|rule| rule.then == Disposition::Local)
    {
        LocalRule::Always
    } else if lists.is_empty() {
        LocalRule::Never
    } else {
        LocalRule::When(lists)
    }
}

#[cfg(test)]
mod tests;
