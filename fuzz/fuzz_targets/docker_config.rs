//! libFuzzer's program for `foreshore_fuzz::docker_config`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foreshore_fuzz::docker_config::run(bytes));
