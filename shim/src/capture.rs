//! Taking the image of a stopped process.

use std::fs;
use std::io;

use linklayer::image::MmFields;

/// Reads the mm fields of a process from /proc/PID/stat (proc_pid_stat(5), fields 26-28 and 45-51), all but `brk` and `end_brk`. The
/// reader must be allowed to trace it, else they are 0.
pub fn mm_fields(pid: i32) -> io::Result<MmFields> {
    let text = fs::read(format!("/proc/{pid}/stat"))?;
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    // The name in parentheses may contain anything; the fields after it begin with the third.
    let end = text.iter().rposition(|b| *b == b')').ok_or_else(invalid)?;
    let text = std::str::from_utf8(&text[end + 1..]).map_err(|_| invalid())?;
    let fields: Vec<&str> = text.split_whitespace().collect();
    let field = |n: usize| {
        fields
            .get(n - 3)
            .and_then(|f| f.parse::<u64>().ok())
            .ok_or_else(invalid)
    };
    Ok(MmFields {
        start_code: field(26)?,
        end_code: field(27)?,
        start_stack: field(28)?,
        start_data: field(45)?,
        end_data: field(46)?,
        start_brk: field(47)?,
        brk: 0,
        arg_start: field(48)?,
        arg_end: field(49)?,
        env_start: field(50)?,
        env_end: field(51)?,
    })
}
