//! What any broker of this system must do, asked of the embedded one and of mosquitto with our configuration.
//!
//! "Denied" is judged by whether data crosses, not by what the broker answers: MQTT 3.1.1 cannot answer at all.

#[path = "broker/bed.rs"]
mod bed;
#[path = "broker/burst.rs"]
mod burst;
#[path = "broker/doors.rs"]
mod doors;
#[path = "broker/hostile.rs"]
mod hostile;
#[path = "broker/isolation.rs"]
mod isolation;
#[path = "broker/sessions.rs"]
mod sessions;
#[path = "broker/wills.rs"]
mod wills;
#[path = "broker/wire.rs"]
mod wire;

macro_rules! contract {
    ($($module:ident: $($test:ident)*;)*) => {
        mod embedded {
            $($(
                #[test]
                fn $test() {
                    crate::$module::$test(&mut crate::bed::Bed::new(crate::bed::Kind::Embedded));
                }
            )*)*
        }
        mod mosquitto {
            $($(
                #[test]
                fn $test() {
                    crate::$module::$test(&mut crate::bed::Bed::new(crate::bed::Kind::Mosquitto));
                }
            )*)*
        }
    };
}

contract! {
    isolation:
        no_device_publishes_for_another
        no_device_leaves_a_will_for_another
        no_device_reads_what_is_not_its_own
        no_device_takes_over_the_session_of_another
        a_topic_alias_is_no_way_around
        everybody_may_do_what_they_must;
    doors:
        whoever_proves_nothing_is_refused
        a_device_cannot_come_as_the_hub
        many_silent_connections_do_not_keep_others_out;
    wills:
        a_lost_connection_fires_the_will_and_a_goodbye_does_not
        a_silent_connection_is_found_out
        a_delayed_will_waits_and_a_return_cancels_it
        after_a_takeover_the_last_birth_is_what_is_kept;
    sessions:
        kept_messages_come_on_every_subscription
        messages_wait_for_a_session_that_is_away
        a_session_expires
        a_clean_start_forgets
        a_restarted_broker_takes_clients_back;
    hostile:
        large_packets_pass_and_too_large_ones_do_not
        garbage_harms_nobody_else;
    burst:
        nothing_that_the_hub_acknowledged_is_lost;
}
