//! What the kernel knows of processes and sockets.

use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::path::Path;

/// User and system time of a process so far, in seconds (proc_pid_stat(5), fields 14 and 15).
pub(crate) fn cpu_seconds(pid: i32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let ticks: u32 = fields
        .split(' ')
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u32>().ok())
        .sum();
    f64::from(ticks) / 100.0
}

/// A line of `/proc/PID/status` in KiB, for example `VmRSS` or `VmHWM`; 0 when there is none.
pub(crate) fn memory_kib(pid: i32, line: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let found = status
        .lines()
        .find_map(|text| text.strip_prefix(line)?.strip_prefix(':'));
    found
        .and_then(|text| text.trim().strip_suffix(" kB")?.trim().parse().ok())
        .unwrap_or(0)
}

/// How many file descriptors a process has.
pub(crate) fn descriptors(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Bytes of a database with what is in its log, in MiB.
pub(crate) fn database_mib(data: &Path) -> f64 {
    let files = ["hub.db", "hub.db-wal"].map(|name| data.join(name));
    let bytes: u64 = (files.iter())
        .filter_map(|file| Some(std::fs::metadata(file).ok()?.len()))
        .sum();
    bytes as f64 / f64::from(1 << 20)
}

/// What one TCP connection has sent and received.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wire {
    /// Both ways, acknowledgements without data among them.
    pub(crate) segments: u64,
    /// Of data, both ways.
    pub(crate) bytes: u64,
}

impl Wire {
    /// Of IPv4 and TCP headers with timestamps, which Linux uses by default.
    pub(crate) const HEADER_BYTES: u64 = 20 + 20 + 12;

    /// Bytes of IP packets.
    pub(crate) const fn ip_bytes(self) -> u64 {
        self.bytes + self.segments * Self::HEADER_BYTES
    }

    /// So far, from `TCP_INFO` (tcp(7), `linux/tcp.h`: `tcpi_bytes_acked`, `tcpi_bytes_received`, `tcpi_segs_out`,
    /// `tcpi_segs_in`; libc's own structure ends before them).
    pub(crate) fn of(socket: BorrowedFd<'_>) -> Self {
        let mut info = [0_u8; 256];
        let mut length: libc::socklen_t = 256;
        #[expect(
            unsafe_code,
            reason = "getsockopt(2) has no safe wrapper in the standard library"
        )]
        // SAFETY: the kernel writes at most `length` bytes into a buffer of that size.
        let got = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                info.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if got != 0 || length < 144 {
            return Self::default();
        }
        let long = |at: usize| {
            let bytes = info[at..at + 8].try_into().expect("eight bytes");
            u64::from_ne_bytes(bytes)
        };
        let int = |at: usize| {
            let bytes = info[at..at + 4].try_into().expect("four bytes");
            u64::from(u32::from_ne_bytes(bytes))
        };
        Self {
            segments: int(136) + int(140),
            bytes: long(120) + long(128),
        }
    }
}

/// Raises the soft limit of open files to the hard one; programs that are started then have it too. What it is.
pub(crate) fn raise_open_files() -> usize {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    #[expect(
        unsafe_code,
        reason = "getrlimit(2) and setrlimit(2) have no safe wrapper in the standard library"
    )]
    // SAFETY: both take a pointer to a structure that lives longer than the call.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            _ = libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
    usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX)
}
