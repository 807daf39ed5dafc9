//! The payload of the lifecycle bench: writes the monotonic clock in nanoseconds as its first act, then
//! sleeps if it has an argument. Compiled statically by the bench itself.

use std::io::Write as _;

#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

unsafe extern "C" {
    fn clock_gettime(clock: i32, time: *mut Timespec) -> i32;
}

fn main() {
    let mut now = Timespec {
        seconds: 0,
        nanoseconds: 0,
    };
    // SAFETY: `now` is a valid timespec to write to; 1 is CLOCK_MONOTONIC.
    unsafe { clock_gettime(1, &raw mut now) };
    println!("{}", now.seconds * 1_000_000_000 + now.nanoseconds);
    std::io::stdout().flush().unwrap();
    if std::env::args().nth(1).is_some() {
        loop {
            std::thread::sleep(std::time::Duration::from_secs(3600));
        }
    }
}
