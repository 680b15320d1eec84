%% Waiting for one message, and what to do with it; a test that waits in vain shows its mailbox.
-define(EXPECT(Pattern, Result, Timeout),
        (fun() ->
             receive Pattern -> Result
             after Timeout ->
                 error({not_received, ??Pattern, process_info(self(), messages)})
             end
         end)()).
-define(EXPECT(Pattern, Result), ?EXPECT(Pattern, Result, 10000)).
-define(EXPECT(Pattern), ?EXPECT(Pattern, ok, 10000)).

%% Nothing of this kind is in the mailbox: to be asked only behind an event after which none can come.
-define(NOTHING(Pattern),
        (fun() ->
             receive Pattern = Unwanted -> error({unwanted, Unwanted})
             after 0 -> ok
             end
         end)()).
